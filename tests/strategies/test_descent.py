"""Clipping and smoothness over a network in stages, here and on two workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglight.networks import StableNet
from sglight.networks.regularisers import penalty
from sglight.strategies.backprop import Backprop
from sglight.strategies.dni import DNI
from sglight.strategies.multilevel import Multilevel
from tests.parallel.training import train_on
from tests.strategies.common import NETWORK, assert_equal, batches, fit, whole

SGD = {"name": "sgd", "lr": 0.3, "momentum": 0.0}
EXACT = {"levels": 1, "level": {"mode": "exact"}, "microbatches": 1}
OPTIONS: list[dict[str, Any]] = [{"clip_norm": 0.05}, {"regularisation": {"smoothness": 0.3}}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("stages", [2, 3, 6])
def test_exact_stages_are_clipped_and_smoothed_as_the_whole(stages: int, options: dict[str, Any]) -> None:
    data = batches(6)
    reference = Backprop(NETWORK, SGD, **options)
    staged = Multilevel(NETWORK, SGD, stages=stages, **EXACT, **options)
    for module in (reference, staged):
        fit(module, data)
    if "clip_norm" in options:  # the norm is summed stage by stage
        for name, value in whole(staged).items():
            torch.testing.assert_close(value, whole(reference)[name], rtol=1e-5, atol=1e-6)
    else:
        assert_equal(whole(staged), whole(reference))


def test_one_step_of_an_exact_network_is_as_long_as_the_norm() -> None:
    module = Multilevel(NETWORK, {**SGD, "lr": 1.0}, stages=3, **EXACT, clip_norm=0.01)
    fit(module, batches(1))
    before = StableNet(**NETWORK).state_dict()
    moved = sum((value - before[name]).square().sum() for name, value in whole(module).items())
    assert moved.sqrt() == pytest.approx(0.01, rel=1e-3)


def test_elsewhere_each_stage_is_clipped_by_its_own_norm() -> None:
    module = DNI(NETWORK, {**SGD, "lr": 1.0}, stages=2, clip_norm=0.01)
    fit(module, batches(1))
    before = StableNet(**NETWORK)
    last, start = module.stage(1), before.split(list(module.cuts))[1].state_dict()
    moved = sum((value - start[name]).square().sum() for name, value in last.state_dict().items())
    assert moved.sqrt() == pytest.approx(0.01, rel=1e-3)


def test_elsewhere_smoothness_stays_within_stages() -> None:
    """With no loss to speak of, what moves at a cut comes from the penalty of the stage alone."""
    network = {**NETWORK, "channels": 3}
    module = DNI(network, {**SGD, "lr": 0.1}, stages=2, regularisation={"smoothness": 1.0}, lag=50)
    fit(module, batches(1))
    stage = StableNet(**network).split(list(module.cuts))[0]
    value = penalty([stage], 1.0)
    assert value is not None
    value.backward()
    for segment in stage.segments.values():
        expected = segment.weight - 0.1 * segment.weight.grad  # type: ignore[operator]
        torch.testing.assert_close(module.stage(0).segments["0"].weight, expected)


def test_two_workers_clip_and_smooth_as_one() -> None:
    both = {"clip_norm": 0.05, "regularisation": {"smoothness": 0.3}}
    jobs = [{"network": NETWORK, "kind": Multilevel, "options": {"stages": 3, **EXACT, **both}}]
    (alone,), (together,) = train_on(1, jobs), train_on(2, jobs)
    assert_equal(together.parameters, alone.parameters)


def test_the_summary_says_which() -> None:
    both = {"clip_norm": 0.5, "regularisation": {"smoothness": 0.3}}
    assert (
        "the whole gradient clipped at 0.5, smooth in time across cuts"
        in Backprop(NETWORK, SGD, **both).describe()
    )
    assert (
        "each stage's gradient clipped at 0.5, smooth in time within stages"
        in DNI(NETWORK, SGD, **both).describe()
    )
