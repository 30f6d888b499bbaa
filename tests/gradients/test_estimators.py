"""Estimators: start at zero, see the label, learn a gradient that they can represent."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglight.gradients import (
    Head,
    ResidualGradient,
    SobolevGradient,
    SyntheticGradient,
    prediction_cost,
    prediction_values,
    synthetic_gradient,
)
from sglight.strategies.loss import Loss

SHAPES = {"linear": (6,), "mlp": (6,), "conv": (4, 5, 5)}


def make(name: str, conditional: bool = True, shape: tuple[int, ...] | None = None) -> SyntheticGradient:
    return synthetic_gradient(name, shape or SHAPES[name], 3, [16], conditional, 3, 0, "estimators", 2)


def sample(name: str, size: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = torch.randn(size, *SHAPES[name], generator=generator)
    return state, torch.randint(3, (size,), generator=generator)


@pytest.mark.parametrize("name", SHAPES)
def test_starts_at_zero_and_has_the_shape_of_the_state(name: str) -> None:
    state, labels = sample(name)
    estimate = make(name).estimate(state, labels, 0.5)
    assert estimate.shape == state.shape
    assert not estimate.any()
    assert not estimate.requires_grad


@pytest.mark.parametrize("name", SHAPES)
def test_learns_a_gradient_that_depends_on_the_label(name: str) -> None:
    # More samples than the unconditional model can learn by heart.
    state, labels = sample(name, size=500)
    target = 0.3 * state + torch.tensor([-1.0, 0.0, 2.0])[labels].view(-1, *[1] * (state.ndim - 1))
    errors = {}
    for conditional in (False, True):
        estimator = make(name, conditional)
        estimator.optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-2)
        losses = [float(estimator.learn(state, labels, target, 0.5)) for _ in range(300)]
        assert losses[0] == pytest.approx(float(target.square().sum()) / len(labels), rel=1e-5)
        errors[conditional] = losses[-1] / losses[0]
    assert errors[True] < 0.05
    assert errors[False] > 2 * errors[True]


@pytest.mark.parametrize("name", SHAPES)
def test_a_lesson_leaves_state_and_target_alone(name: str) -> None:
    state, labels = sample(name)
    kept = state.clone()
    estimator = make(name)
    estimator.optimizer = torch.optim.SGD(estimator.parameters(), lr=0.1)
    estimator.learn(state, labels, torch.ones_like(state), 0.5)
    assert torch.equal(state, kept)
    assert state.grad is None


@pytest.mark.parametrize("name", SHAPES)
def test_the_cost_counts_the_multiplications_of_the_layers(name: str) -> None:
    estimator = make(name)
    counted = 0
    values: list[int] = []
    state, labels = sample(name, size=1)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        pixels = output[0].numel() // output.shape[1]
        counted += module.weight.numel() * pixels  # type: ignore[union-attr, operator]
        values.append(output[0].numel())

    for module in estimator.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(count)
    estimator.estimate(state, labels, 0.5)
    assert prediction_cost(name, SHAPES[name], [16], 3) == counted
    assert prediction_values(name, SHAPES[name], [16]) == sum(values)


def test_initial_values_depend_on_the_place_alone() -> None:
    torch.manual_seed(0)
    first = make("mlp")
    torch.randn(10)
    for a, b in zip(first.parameters(), make("mlp").parameters(), strict=True):
        assert torch.equal(a, b)
    other = synthetic_gradient("mlp", (6,), 3, [16], True, 3, 0, "estimators", 4)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_conv_on_vectors_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.kernel=conv"):
        make("conv", shape=(6,))
    with pytest.raises(ValueError, match=r"strategy\.estimator\.name=rnn"):
        make("rnn", shape=(6,))


def test_lessons_in_one_autocast_context_build_on_each_other() -> None:
    state, labels = sample("mlp")
    losses = []
    for together in (True, False):
        estimator = make("mlp")
        estimator.optimizer = torch.optim.SGD(estimator.parameters(), lr=0.05)
        found = []
        with torch.autocast("cpu", torch.bfloat16, enabled=together):
            for _ in range(4):
                with torch.autocast("cpu", torch.bfloat16):
                    found.append(float(estimator.learn(state, labels, torch.ones_like(state), 0.5)))
        losses.append(found)
    assert losses[0] == losses[1]
    assert losses[0][3] < losses[0][0]


def head_of(name: str) -> Head:
    return Head(name, SHAPES[name], 3, [7], 4, 0.0, Loss(), 0, "heads", 2)


def residual(name: str) -> ResidualGradient:
    estimator = ResidualGradient(head_of(name), make(name))
    estimator.optimizer = torch.optim.Adam(estimator.parameters(), lr=1e-2)
    return estimator


@pytest.mark.parametrize("name", SHAPES)
def test_a_residual_is_a_heads_gradient_and_a_model_of_what_it_lacks(name: str) -> None:
    (state, labels), target = sample(name), torch.randn(30, *SHAPES[name])
    ours, head, model = residual(name), residual(name).head, residual(name).model
    adam = torch.optim.Adam([*head.parameters(), *model.parameters()], lr=1e-2)
    for _ in range(4):
        h = state.detach().requires_grad_()
        F.cross_entropy(head.layers(h), labels, reduction="sum").backward()
        for p in head.parameters():
            p.grad *= 1 / 30
        estimate = h.grad + model(state, labels)
        assert torch.equal(ours.estimate(state, labels, 0.5), estimate)
        error = (model(state, labels) - (target - h.grad)).square().sum() / 30
        error.backward()
        adam.step()
        adam.zero_grad()
        assert torch.equal(ours.learn(state, labels, target, 0.5), error)


@pytest.mark.parametrize("name", SHAPES)
def test_a_sobolev_lesson_is_one_step_on_both_losses(name: str) -> None:
    """The parameters of a lesson by plain descent, against differences of the two losses."""
    rate, difference = 1e-3, 1e-5
    (state, labels), target = sample(name), torch.randn(30, *SHAPES[name])
    head = head_of(name).double()
    torch.nn.init.normal_(head.layers[-1].weight)
    ours = SobolevGradient(deepcopy(head))
    ours.optimizer = torch.optim.SGD(ours.parameters(), lr=rate)
    state, target = state.double(), target.double()

    def both() -> tuple[float, float]:
        h = state.clone().requires_grad_()
        loss = F.cross_entropy(head.layers(h), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, h)
        return float(loss.detach()) / 30, float((gradient - target).square().sum()) / 30

    assert torch.equal(ours.estimate(state, labels, 0.5), head.estimate(state, labels, 0.5))
    assert float(ours.learn(state, labels, target, 0.5)) == pytest.approx(both()[1])
    for p, updated in zip(head.parameters(), ours.parameters(), strict=True):
        direction = torch.randn_like(p)
        p.data += difference * direction
        ahead = sum(both())
        p.data -= 2 * difference * direction
        behind = sum(both())
        p.data += difference * direction
        slope = float(((p - updated).detach() / rate * direction).sum())
        assert slope == pytest.approx((ahead - behind) / (2 * difference), rel=1e-4, abs=1e-6)


def test_a_sobolev_estimator_learns_the_gradient_of_another_classifier() -> None:
    state, labels = sample("mlp")
    teacher = head_of("linear")
    torch.nn.init.normal_(teacher.layers[-1].weight)
    target = teacher.estimate(state, labels, 0.5)
    ours = SobolevGradient(head_of("linear"))
    ours.optimizer = torch.optim.Adam(ours.parameters(), lr=3e-2)
    losses = [float(ours.learn(state, labels, target, 0.5)) for _ in range(300)]
    assert losses[-1] < 0.2 * losses[0]
