"""Local heads: small classifiers at a boundary, whose own loss gives the stage before it a gradient at once.

Belilovsky et al. 2020, "Decoupled greedy learning of CNNs" (heads of reduced resolution); Nøkland & Eidnes 2019,
"Training neural networks with local error signals" (similarity matching). The last layer starts at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from sglight.compat.torch import scale_
from sglight.gradients.estimators import TrainedEstimator
from sglight.networks.parts import Conv, Linear, Shape

REDUCED = 2  # the image size after the convolutions of a ``conv`` head
TINY = 1e-8  # added to a variance, because the square root has no gradient at zero
OPTIMIZER = "strategy.head.optimizer"  # the config key of the heads' optimiser


class Criterion(Protocol):
    """The loss of the network, which local heads minimise as well."""

    def total(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss summed over the samples."""

    def normaliser(self, labels: Tensor) -> float:
        """The number by which the sum is divided for the mean."""


class Reduced(nn.Module):
    """Averages images down to at most ``side`` x ``side``; other states and smaller images are not changed."""

    def __init__(self, shape: Shape, side: int) -> None:
        super().__init__()
        self.tiles = tuple(-(-length // side) for length in shape[1:])
        self.shape = (shape[0], *(-(-n // k) for n, k in zip(shape[1:], self.tiles, strict=True)))

    @override
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.tiles, ceil_mode=True) if max(self.tiles, default=1) > 1 else x


class Head(TrainedEstimator):
    """A classifier of the states h at a boundary. The gradient of its own loss trains the stage before it.

        l(h) = (1 - s) criterion(logits(h), y) + s B mean((S(q(h)) - S(one-hot y))^2)

    is the loss summed over the batch. s is 0 without similarity matching, q is a linear layer or a convolution, and S
    are the `similarities` of the samples of a batch (Nøkland & Eidnes 2019, equations 1 to 3, "predsim"). A head sees
    all fields of the state, so that all of them get a gradient; the classifier of the network sees only the first.

    Args:
        kind: ``linear``, ``mlp`` or ``conv`` (1x1 convolutions, then an average to 2x2 pixels, then a hidden layer).
        shape: of the state.
        classes: how many.
        hidden: the widths of hidden layers, or of the convolutions.
        pool: images are first averaged down to this size.
        similarity: s.
        criterion: the loss of the network.
        seed, place: of the random stream of the initial values.
    """

    optimizer_key: ClassVar[str] = OPTIMIZER

    def __init__(
        self,
        kind: str,
        shape: Shape,
        classes: int,
        hidden: Sequence[int],
        pool: int,
        similarity: float,
        criterion: Criterion,
        seed: int,
        *place: str | int,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.criterion, self.similarity = criterion, similarity
        self.layers = _layers(kind, shape, classes, hidden, pool, seed, *place)
        self.matched: nn.Module | None = None
        if similarity:
            self.matched = (
                Conv(shape[0], shape[0], 3, seed, *place, "similarity")
                if len(shape) == 3
                else Linear(math.prod(shape), math.prod(shape), seed, *place, "similarity")
            )

    def forward(self, state: Tensor) -> Tensor:
        """Logits ``[B, classes]``."""
        logits: Tensor = self.layers(state)
        return logits

    def loss(self, state: Tensor, labels: Tensor) -> Tensor:
        """The own loss, summed over the samples."""
        loss = self.criterion.total(self(state), labels)
        if self.matched is None:
            return loss
        wanted = similarities(F.one_hot(labels, self.classes).to(state.dtype))
        mismatch = F.mse_loss(similarities(self.matched(state)), wanted)
        return (1 - self.similarity) * loss + self.similarity * self.criterion.normaliser(labels) * mismatch

    @override
    def estimate(self, state: Tensor, labels: Tensor, time: float) -> Tensor:
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(state, labels), state)
        return gradient

    @override
    def learn(self, state: Tensor, labels: Tensor, target: Tensor | None, time: float) -> Tensor:
        """One optimiser step on the mean of the own loss; returns the loss before it. There is no target."""
        return self.descend(state, labels)[1]

    def descend(self, state: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`estimate` and `learn` in one pass: the gradient, and the mean loss before the optimiser step."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        found = self.gradients(state, labels)
        self.step()
        return found

    def gradients(self, state: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`descend` without the optimiser step: leaves the gradients of the mean loss in the parameters."""
        state = state.detach().requires_grad_()
        loss, normaliser = self.loss(state, labels), self.criterion.normaliser(labels)
        loss.backward()
        mean, scale = loss.detach() / (normaliser or 1.0), 1 / (normaliser or 1.0)
        scale_([p.grad for p in self.parameters() if p.grad is not None], scale)
        mean = self.average(mean, normaliser)
        assert state.grad is not None
        return state.grad, mean


def similarities(features: Tensor) -> Tensor:
    """Cosines ``[B, B]`` between the centred features of samples; of images, the standard deviation of each channel."""
    if features.ndim == 4:
        features = (features.flatten(2).var(2, correction=0) + TINY).sqrt()
    rows = F.normalize(features - features.mean(1, keepdim=True), dim=1, eps=TINY)
    return rows @ rows.T


def _layers(
    kind: str, shape: Shape, classes: int, hidden: Sequence[int], pool: int, seed: int, *place: str | int
) -> nn.Sequential:
    """The layers of a head, from states to logits; the last one starts at zero."""
    first = Reduced(shape, pool)
    if kind == "conv":
        widths = [shape[0], *hidden]
        convs = [
            Conv(a, b, 1, seed, *place, "conv", i, gain=2**0.5) for i, (a, b) in enumerate(pairwise(widths))
        ]
        second = Reduced((widths[-1], *first.shape[1:]), REDUCED)
        start, size, widths = [first, *_activated(convs), second], math.prod(second.shape), [*hidden[-1:]]
    else:
        start, size, widths = [first], math.prod(first.shape), [] if kind == "linear" else [*hidden]
    dense = [Linear(a, b, seed, *place, i, gain=2**0.5) for i, (a, b) in enumerate(pairwise([size, *widths]))]
    last = Linear([size, *widths][-1], classes, seed, *place, "classifier", gain=0.0)
    return nn.Sequential(*start, nn.Flatten(), *_activated(dense), last)


def _activated(layers: Sequence[nn.Module]) -> list[nn.Module]:
    return [part for layer in layers for part in (layer, nn.ReLU())]


def head_multiplications(
    kind: str, shape: Shape, classes: int, hidden: Sequence[int], pool: int, similarity: float
) -> float:
    """Multiplications per sample of one forward pass of a `Head`, without those between samples."""
    first = Reduced(shape, pool).shape
    start, widths = 0.0, [math.prod(first), *(() if kind == "linear" else hidden), classes]
    if kind == "conv":
        channels = [shape[0], *hidden]
        start = math.prod(first[1:]) * sum(a * b for a, b in pairwise(channels))
        widths = [math.prod(Reduced((channels[-1], *first[1:]), REDUCED).shape), *hidden[-1:], classes]
    matched = shape[0] ** 2 * (9 * math.prod(shape[1:]) if len(shape) == 3 else 1) if similarity else 0
    return float(start + sum(a * b for a, b in pairwise(widths)) + matched)
