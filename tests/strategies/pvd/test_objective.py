"""The objective against plain torch on the uncut network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglight.networks import StableNet
from sglight.networks.regularisers import penalty
from sglight.strategies.loss import Loss
from sglight.strategies.pvd.objective import Evaluated, Objective, flat
from sglight.strategies.recorder import Recorder
from tests.strategies.common import IMAGES, NETWORK
from tests.strategies.pvd.common import objective, samples, shared

NETWORKS: dict[str, dict[str, Any]] = {
    "dense": NETWORK,
    "reversible": {**NETWORK, "reversible": True},
    "images": {**IMAGES, "channels": [3, 4], "steps": [3, 2], "connector": "linear", "normalisation": "layer"},
    "leapfrog": {**NETWORK, "dynamics": "leapfrog", "channels": [5, 6], "steps": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_value_and_gradient_are_those_of_plain_torch(name: str) -> None:
    network = NETWORKS[name]
    net, f = StableNet(**network), shared(network)
    x, y = samples(network)
    loss = F.cross_entropy(net(x), y) + penalty([net], 0.1)
    loss = loss + 0.005 * sum(p.square().sum() for p in net.parameters())
    loss.backward()
    point = f.objective.read()
    value, gradient = f.differentiate(point)
    assert value == pytest.approx(float(loss), rel=1e-5)
    assert f.evaluate(point).value == pytest.approx(value, rel=1e-6)
    assert f.evaluate(point).accuracy == pytest.approx(float((net(x).argmax(1) == y).float().mean()))
    # Put together again, by name: stages hold slices of the segments' parameters.
    f.objective.write(gradient)
    found: dict[str, list[Tensor]] = {}
    for stage in f.objective._stages:
        for key, parameter in stage.named_parameters():
            found.setdefault(key, []).append(parameter.detach())
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(torch.cat(found[key]), parameter.grad, rtol=1e-4, atol=1e-6)


LOSSES: dict[str, dict[str, Any]] = {
    "weighted": {"class_weights": [1.0, 0.5, 2.0, 0.1]}, "smoothed": {"label_smoothing": 0.2}, "mse": {"name": "mse"},
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_is_the_losses_own(name: str) -> None:
    loss, net = Loss(**LOSSES[name]), StableNet(**NETWORK)
    f = shared(NETWORK, loss=loss)
    x, y = samples(NETWORK)
    if name == "mse":
        mean = F.mse_loss(net(x), F.one_hot(y, 4).float(), reduction="sum") / len(y)
    else:
        weight = torch.tensor(LOSSES[name].get("class_weights", [1.0] * 4))
        mean = F.cross_entropy(net(x), y, weight, label_smoothing=LOSSES[name].get("label_smoothing", 0.0))
    mean = mean + penalty([net], 0.1) + 0.005 * sum(p.square().sum() for p in net.parameters())
    mean.backward()
    point = f.objective.read()
    value, gradient = f.differentiate(point)
    sums, on_batch, own = f.objective.on_batch(point, [(x, y)], [0, 1, 2])
    assert sums == f.objective.sums(point, [(x, y)])[0]
    norm = float(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm())
    assert value == pytest.approx(float(mean.detach()), rel=1e-5) and on_batch == pytest.approx(
        value, rel=1e-5
    )
    assert f.evaluate(point).value == pytest.approx(value, rel=1e-6)
    for found in (gradient, own):
        assert float(flat(found).norm()) == pytest.approx(norm, rel=1e-4)


def test_blocks_are_ranges_of_time_with_opening_and_classifier() -> None:
    stages = StableNet(**NETWORK).split(3)
    sizes = [len(block) for block in Objective(stages, Loss(), {}, 0.0, Recorder()).read()]
    steps = [stage.segments["0"].steps * (5 * 5 + 5) for stage in stages]
    opening, classifier = 3 * 5 + 5, 5 * 4 + 4
    assert sizes == [steps[0] + opening, steps[1], steps[2] + classifier]


def test_what_is_written_is_read() -> None:
    f = objective(NETWORK)
    point = [torch.randn_like(block) for block in f.read()]
    f.write(point)
    assert torch.equal(flat(f.read()), flat(point))


def test_the_gradient_of_some_blocks_is_a_part_of_the_whole() -> None:
    f, chunk = objective(NETWORK), samples(NETWORK)
    point = f.read()
    _, _, whole = f.on_batch(point, [chunk], [0, 1, 2])
    _, _, parts = f.on_batch(point, [chunk], [2, 0])
    assert torch.equal(parts[0], whole[2]) and torch.equal(parts[1], whole[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.5])
def test_what_is_no_number_is_worse(value: float) -> None:
    assert not Evaluated([], value).no_worse_than(Evaluated([], 1.0))
    assert Evaluated([], 1.0).no_worse_than(Evaluated([], 1.0))
