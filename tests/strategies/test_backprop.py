"""Backprop against plain torch: one loop from the definition of each option."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from sglight.networks import NetworkSpec, StableNet, Stage
from sglight.networks.regularisers import penalty
from sglight.strategies.backprop import Backprop
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches, exact_step, fit, whole

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}


def plain(data, clip=None, smoothness=0.0):
    """Mean cross-entropy by plain torch, SGD with momentum."""
    net = StableNet(**NETWORK)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        loss = F.cross_entropy(net(x), y)
        if smoothness:
            loss = loss + penalty([net], smoothness)
        sgd.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        sgd.step()
    return dict(net.named_parameters())


@pytest.mark.parametrize("options", [{}, {"clip": 0.05}, {"smoothness": 0.1}])
def test_equals_plain_torch(options: dict[str, float]) -> None:
    data = batches(10)
    module = Backprop(
        NETWORK,
        SGD,
        clip_norm=options.get("clip"),
        regularisation={"smoothness": options.get("smoothness", 0.0)},
    )
    fit(module, data)
    for name, value in plain(data, **options).items():
        torch.testing.assert_close(whole(module)[name], value.detach(), rtol=1e-4, atol=1e-6)


def test_clipping_limits_the_step() -> None:
    data = batches(1)
    module = Backprop(NETWORK, {"name": "sgd", "lr": 1.0, "momentum": 0.0}, clip_norm=0.01)
    fit(module, data)
    before = StableNet(**NETWORK).state_dict()
    moved = sum((value - before[name]).square().sum() for name, value in whole(module).items())
    assert moved.sqrt() == pytest.approx(0.01, rel=1e-3)


def test_weight_decay_pulls_all_parameters() -> None:
    decayed = Backprop(NETWORK, {**SGD, "weight_decay": 0.5})
    free = Backprop(NETWORK, SGD)
    for module in (decayed, free):
        fit(module, batches(5))
    assert whole(decayed)["segments.0.weight"].norm() < whole(free)["segments.0.weight"].norm()


def test_the_same_seed_gives_the_same_run() -> None:
    runs = [Backprop(IMAGES, ADAM) for _ in range(2)]
    for module in runs:
        fit(module, batches(5, shape=(1, 6, 6)))
    assert_equal(runs[0].state_dict(), runs[1].state_dict())


def test_learning_halves_the_loss() -> None:
    data = batches(4, size=8)
    module = Backprop({**NETWORK, "channels": 16}, {"name": "adam", "lr": 3e-2})
    trainer = fit(module, data, epochs=40, log_every_n_steps=1)
    assert trainer.callback_metrics["train/loss"] < 0.5 * torch.log(torch.tensor(4.0))


def test_its_phases_are_timed() -> None:
    metrics = fit(Backprop(NETWORK, SGD), batches(7)).callback_metrics
    assert metrics["time/stage_0/forward_s"] > 0
    assert metrics["time/stage_0/backward_s"] > 0
    assert metrics["time/stage_0/learn_s"] == 0
    assert "speedup/theoretical" not in metrics


def test_reversible_trains_like_stored() -> None:
    runs = [Backprop({**NETWORK, "reversible": r}, SGD) for r in (False, True)]
    for module in runs:
        fit(module, batches(5))
    for a, b in zip(*(whole(module).values() for module in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_state_dict_names_are_by_stage() -> None:
    module = Backprop(NETWORK, ADAM)
    module.configure_model()
    module.configure_model()
    assert sorted(module.state_dict()) == [
        "stages.0.classifier.linear.bias",
        "stages.0.classifier.linear.weight",
        "stages.0.opening.bias",
        "stages.0.opening.weight",
        "stages.0.segments.0.bias",
        "stages.0.segments.0.weight",
    ]


def test_float64_runs_in_float64() -> None:
    module = Backprop(NETWORK, ADAM)
    fit(module, batches(2), precision="64-true")
    assert all(p.dtype == torch.float64 for p in module.parameters())


def test_bad_network_names_its_key() -> None:
    with pytest.raises(ValueError, match=r"model\.activation=gelu"):
        NetworkSpec(**{**NETWORK, "activation": "gelu"}).segments  # noqa: B018
    with pytest.raises(ValueError, match=r"model\.opening=pad needs a width of at least"):
        Backprop({**NETWORK, "opening": "pad", "channels": 2}, ADAM)


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_pieces_of_a_batch_make_one_gradient(stages: int, m: int) -> None:
    """Against a plain loop over pieces, bit for bit; the last batch is smaller and does not divide."""
    data = [*batches(3), *batches(1, size=7)]
    module = Backprop(NETWORK, ADAM, stages=stages, microbatches=m)
    parts = [Stage(NetworkSpec(**NETWORK), a, b) for a, b in pairwise(module.cuts)]
    adams = [torch.optim.Adam(part.parameters(), lr=ADAM["lr"]) for part in parts]
    for x, y in data:
        exact_step(parts, adams, x, y, m)
    fit(module, data)
    for i, part in enumerate(parts):
        assert_equal(module.stage(i).state_dict(), part.state_dict())


def test_one_piece_would_keep_one_worker_busy() -> None:
    with pytest.raises(ValueError, match=r"strategy\.microbatches=1 leaves all but one of 2 workers idle"):
        Backprop(NETWORK, ADAM, stages=2, microbatches=1).groups(2)
    assert Backprop(NETWORK, ADAM, stages=2).groups(2) == [range(1), range(1, 2)]


def test_pieces_follow_from_the_stages() -> None:
    assert Backprop(NETWORK, ADAM).plan.schedule.pieces == 1
    module = Backprop(NETWORK, ADAM, stages=2)
    fit(module, batches(1))
    assert module.plan.schedule.pieces == 4
    assert module.plan.schedule.flushes
