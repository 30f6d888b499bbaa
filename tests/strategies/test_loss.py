"""The loss against torch's means, also where it is summed over pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglight.networks import StableNet
from sglight.strategies.backprop import Backprop
from sglight.strategies.dni import DNI
from sglight.strategies.loss import Loss
from tests.strategies.common import NETWORK, batches, fit, whole

WEIGHTS = [0.5, 1.0, 2.0, 4.0]
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.0}
LOSSES: dict[str, tuple[dict[str, Any], Any]] = {
    "plain": ({}, F.cross_entropy),
    "smoothed": ({"label_smoothing": 0.2}, torch.nn.CrossEntropyLoss(label_smoothing=0.2)),
    "weighted": ({"class_weights": WEIGHTS}, torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS))),
    "both": (
        {"class_weights": WEIGHTS, "label_smoothing": 0.2},
        torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS), label_smoothing=0.2),
    ),
    "mse": ({"name": "mse"}, lambda logits, y: (logits - F.one_hot(y, 4)).square().sum(1).mean()),
    "margin": (
        {"name": "torch.nn.MultiMarginLoss", "kwargs": {"p": 2}},
        torch.nn.MultiMarginLoss(p=2),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_torchs_mean(name: str) -> None:
    options, torchs = LOSSES[name]
    loss, logits, labels = Loss(**options), torch.randn(9, 4), torch.randint(4, (9,))
    expected = torchs(logits, labels)
    torch.testing.assert_close(loss.total(logits, labels) / loss.normaliser(labels), expected)
    parts = [
        (loss.total(*p), loss.normaliser(p[1])) for p in zip(logits.split(4), labels.split(4), strict=True)
    ]
    torch.testing.assert_close(sum(total for total, _ in parts) / sum(n for _, n in parts), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_what_a_training_minimises_and_logs(name: str) -> None:
    options, torchs = LOSSES[name]
    data = batches(3)
    net, losses = StableNet(**NETWORK), list[Tensor]()
    for x, y in data:
        net.zero_grad()
        losses.append(torchs(net(x), y))
        losses[-1].backward()
        with torch.no_grad():
            for p in net.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
    module = Backprop(NETWORK, SGD, loss=options)
    trainer = fit(module, data, log_every_n_steps=1)
    for key, value in whole(module).items():
        torch.testing.assert_close(value, net.get_parameter(key).detach(), rtol=1e-4, atol=1e-6)
    # Over the epoch: of all samples, each with its weight.
    norms = [module.plan.loss.normaliser(y) for _, y in data]
    expected = sum(loss.detach() * n for loss, n in zip(losses, norms, strict=True)) / sum(norms)
    torch.testing.assert_close(trainer.callback_metrics["train/loss"], expected, rtol=1e-4, atol=1e-6)


def test_evaluation_weighs_samples_as_the_training_does() -> None:
    module = DNI(NETWORK, SGD, loss={"class_weights": WEIGHTS})
    data = batches(3)
    trainer = fit(module, data)
    (found,) = trainer.test(module, torch.utils.data.DataLoader(data, batch_size=None), verbose=False)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    expected = F.cross_entropy(module(x), y, torch.tensor(WEIGHTS))
    assert found["test/loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "hinge"}, r"strategy\.loss\.name=hinge is unknown"),
        ({"name": "mse", "label_smoothing": 0.1}, r"strategy\.loss\.label_smoothing=0\.1 is for"),
        ({"name": "torch.nn.MSELoss", "class_weights": WEIGHTS}, r"strategy\.loss\.class_weights=.* is for"),
        ({"kwargs": {"p": 2}}, r"strategy\.loss\.kwargs is for package\.module\.Class"),
        ({"name": "torch.nn.Linear"}, r"strategy\.loss\.name=torch\.nn\.Linear cannot be made"),
        ({"class_weights": [1.0]}, r"strategy\.loss\.class_weights has 1 entries, but there are 4 classes"),
    ],
)
def test_what_is_wrong_names_its_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Backprop(NETWORK, SGD, loss=options)
