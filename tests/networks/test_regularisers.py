"""Penalties."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sglight.networks import StableNet
from sglight.networks.regularisers import image_smoothness, penalty, time_smoothness


def theta(steps: int) -> torch.Tensor:
    t = torch.arange(steps, dtype=torch.float64) / steps * 2.0
    return torch.stack([torch.sin(t), t**2], 1)


def test_time_smoothness_by_hand() -> None:
    values = torch.tensor([[0.0, 1.0], [2.0, 1.0], [2.0, 4.0]])
    assert float(time_smoothness([values], 0.25)) == (4 + 9) / 0.5


def test_time_smoothness_converges_under_refinement() -> None:
    """To 1/2 int_0^2 cos^2 t + 4 t^2 dt, with the first order of the cut-off last interval."""
    exact = 0.5 * (1 + math.sin(4) / 4 + 32 / 3)
    errors = [abs(float(time_smoothness([theta(n)], 2.0 / n)) - exact) for n in (50, 100, 200, 400)]
    assert errors[-1] < 0.02 * exact
    assert all(a / b == pytest.approx(2, rel=0.1) for a, b in pairwise(errors))


@pytest.mark.parametrize("rule", ["linear", "constant"])
def test_the_penalty_after_refinement(rule: str) -> None:
    """Linear interpolation keeps the integral of theta'^2; repeated steps make the same jumps in half the time."""
    net = StableNet((2,), 2, steps=16, channels=3, seed=1)
    before, after = (penalty([n], smoothness=1.0).item() for n in (net, net.refine(rule)))
    assert after / before == pytest.approx(1.0 if rule == "linear" else 2.0, rel=1e-5)


def test_differences_across_pieces_count() -> None:
    values = theta(10)
    pieces = [values[:3], values[3:4], values[4:]]
    torch.testing.assert_close(time_smoothness(pieces, 0.2), time_smoothness([values], 0.2))
    assert time_smoothness([values[:1]], 0.2) == 0


def test_penalty_of_stages_is_the_wholes_across_the_cuts() -> None:
    net = StableNet((1, 6, 6), 3, kernel="conv", steps=4, channels=[3, 4], horizon=1.0, seed=1)
    weights = {"smoothness": 0.3, "classifier_smoothness": 0.7}
    whole = penalty([net], **weights)
    torch.testing.assert_close(penalty(net.split([0, 1, 3, 6, 8]), **weights), whole)
    segments = net.segments.values()
    by_hand = (
        0.3 / (2 * 0.25) * sum(p.diff(dim=0).square().sum() for s in segments for p in (s.weight, s.bias))
    )
    by_hand += 0.7 * image_smoothness(net.classifier.image_weight)
    torch.testing.assert_close(whole, by_hand)
    alone = sum(penalty([stage], **weights) or 0 for stage in net.split([0, 1, 3, 6, 8])[:-1])
    assert alone < whole


def test_nothing_to_penalise() -> None:
    net = StableNet((1, 4, 4), 3, kernel="conv", steps=4, channels=3, head="pool", seed=1)
    assert penalty([net]) is None
    assert penalty([net], classifier_smoothness=1.0) is None
    assert penalty(net.split(2)[:1], classifier_smoothness=1.0) is None


def test_image_smoothness_by_hand() -> None:
    image = torch.tensor([[[[0.0, 1.0], [3.0, 3.0]]]])
    assert float(image_smoothness(image)) == 0.5 * (9 + 4 + 1 + 0)
    assert image_smoothness(torch.full((2, 3, 4, 4), 1.5)) == 0


def test_gradients_reach_the_parameters() -> None:
    net = StableNet((1, 4, 4), 3, kernel="conv", steps=4, channels=3, seed=1)
    penalty(net.split(2), smoothness=1.0, classifier_smoothness=1.0).backward()
    # The stages' parameters are views of the network's, with gradients of their own.
    assert net.segments["0"].weight.grad is None
    penalty([net], smoothness=1.0, classifier_smoothness=1.0).backward()
    assert net.segments["0"].weight.grad.abs().sum() > 0 and net.classifier.linear.weight.grad.abs().sum() > 0
