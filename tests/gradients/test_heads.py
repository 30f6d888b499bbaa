"""Heads: their cost, their reduced images, similarities, and gradients against differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sglight.gradients.heads import Head, Reduced, head_multiplications, similarities
from sglight.strategies.loss import Loss

KINDS = {"linear": (6,), "mlp": (6,), "conv": (4, 7, 5)}


def make(kind: str, similarity: float = 0.0) -> Head:
    return Head(kind, KINDS[kind], 3, [5, 8], 3, similarity, Loss(), 0, "heads", 2)


def sample(kind: str, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, *KINDS[kind], generator=generator), torch.arange(size) % 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("similarity", [0.0, 0.9])
def test_the_gradient_is_that_of_its_loss(kind: str, similarity: float) -> None:
    head, (state, labels) = make(kind, similarity).double(), sample(kind)
    nn.init.normal_(head.layers[-1].weight)
    state = state.double()
    estimate = head.estimate(state, labels, 0.5)
    direction = torch.randn_like(state)
    with torch.no_grad():
        ahead, behind = (head.loss(state + e * direction, labels) for e in (1e-6, -1e-6))
    assert (estimate * direction).sum() == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_descending_gives_estimate_and_lesson_in_one(kind: str) -> None:
    state, labels = sample(kind)
    one, two = make(kind, 0.5), make(kind, 0.5)
    for head in (one, two):
        head.optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        for _ in range(3):
            head.learn(state, labels, None, 0.5)
    expected = one.estimate(state, labels, 0.5), one.learn(state, labels, None, 0.5)
    found = two.descend(state, labels)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("similarity", [0.0, 0.9])
def test_the_cost_counts_the_multiplications(kind: str, similarity: float) -> None:
    head, counted = make(kind, similarity), 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal counted
        counted += module.weight.numel() * (output[0].numel() // output.shape[1])  # type: ignore[union-attr, operator]

    for module in head.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(count)
    head.loss(*sample(kind, size=1))
    assert head_multiplications(kind, KINDS[kind], 3, [5, 8], 3, similarity) == counted


def test_images_are_averaged_to_a_smaller_one_and_others_left() -> None:
    x = torch.arange(2.0 * 35).view(2, 1, 7, 5)
    small = Reduced((1, 7, 5), 3)
    assert small.shape == small(x).shape[1:] == (1, 3, 3)
    assert small(x)[0, 0, 0, 0] == x[0, 0, :3, :2].mean()
    assert Reduced((1, 7, 5), 7)(x) is x


def test_similarities_are_correlations_between_samples() -> None:
    features = torch.randn(6, 9)
    torch.testing.assert_close(similarities(features), torch.corrcoef(features))
    images = torch.randn(6, 9, 4, 4)
    spread = images.flatten(2).std(2, correction=0)
    torch.testing.assert_close(similarities(images), torch.corrcoef(spread))
    flat = torch.zeros(3, 4, 2, 2, requires_grad=True)  # no direction at all
    similarities(flat).sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all()
