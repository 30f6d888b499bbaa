"""Synthetic gradients: models that predict dL/dh at a boundary from the state h and the label.

Jaderberg et al. 2017, "Decoupled neural interfaces using synthetic gradients". L is the loss summed over the samples,
so that learning rates do not depend on the batch size. The last layer starts at zero, so that an estimator that has
learnt nothing yet does not disturb its stage.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from sglight.config.extension import load_class
from sglight.link import Replicas
from sglight.networks.parts import Conv, Linear, Shape
from sglight.networks.seeding import seeded

READY_MADE = ("linear", "mlp", "conv")


class Estimator(nn.Module, ABC):
    """Gives the stage before a boundary a gradient at once, without waiting for later stages.

    A strategy uses two methods:

    * ``estimate(state, labels, time)`` returns the gradient of each sample, with the shape of the state;
    * ``learn(state, labels, target, time)`` learns from the true gradient and returns the loss before that.

    ``state`` is ``[B, *shape]``, ``labels`` ``[B]``, ``time`` the network time of the boundary in [0, 1].

    Subclass it for your own (``strategy.estimator.name=package.module.Class``). It is built with the keywords ``shape,
    classes, hidden, conditional, kernel_size, seed``, while torch's generator is seeded with ``seed``.
    """

    @classmethod
    def cost(cls, shape: Shape, hidden: Sequence[int], kernel_size: int) -> float:
        """Multiplications per sample of one estimate; override it if they are not negligible."""
        return 0.0

    @abstractmethod
    def estimate(self, state: Tensor, labels: Tensor, time: float) -> Tensor:
        """The gradient of each sample's loss with respect to its state."""

    @abstractmethod
    def learn(self, state: Tensor, labels: Tensor, target: Tensor, time: float) -> Tensor:
        """Learn from the true gradient; returns the loss before that."""


class TrainedEstimator(Estimator):
    """An estimator trained by its own optimiser.

    Attributes:
        optimizer: of its parameters; the strategy sets it before `learn` is called.
        optimizer_key: the config key of its settings, for messages.
        replicas: the workers that have the same estimator, each with its part of a batch.
    """

    optimizer: torch.optim.Optimizer | None = None
    optimizer_key: ClassVar[str] = "strategy.estimator.optimizer"
    replicas = Replicas()

    def average(self, loss: Tensor, weight: float) -> Tensor:
        """Average the loss and the gradients of a lesson over all replicas, which must all call it.

        Args:
            loss: the mean over this replica's samples, whose gradients the parameters have.
            weight: the weight of this mean: the number of its samples, or what else the sum has been divided by.

        Returns:
            the mean over the samples of all replicas.
        """
        if self.replicas.size == 1:
            return loss
        trained = [p for p in self.parameters() if p.grad is not None]
        own = torch.cat([loss.detach().view(1), *(p.grad.flatten() for p in trained if p.grad is not None)])
        own = weight * own if weight else torch.zeros_like(own)  # without samples the mean is NaN
        sums = self.replicas.sum(torch.cat([own, own.new_tensor([weight])]))
        mean, *gradients = (sums[:-1] / sums[-1]).split([1, *(p.numel() for p in trained)])
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient.view_as(p)
        return mean[0]

    def step(self) -> None:
        """Update the parameters with their present gradients."""
        assert self.optimizer is not None
        self.optimizer.step()
        # Autocast keeps copies of the weights in lower precision until its context ends; these are outdated now.
        torch.clear_autocast_cache()


class SyntheticGradient(TrainedEstimator):
    """A model that predicts the gradient, trained on the squared error; subclasses implement ``forward``."""

    @override
    def estimate(self, state: Tensor, labels: Tensor, time: float) -> Tensor:
        with torch.no_grad():
            prediction: Tensor = self(state, labels)
            return prediction.to(state.dtype)

    @override
    def learn(self, state: Tensor, labels: Tensor, target: Tensor, time: float) -> Tensor:
        """One optimiser step on 1/B sum_b ||SG(h_b, y_b) - target_b||^2 (Jaderberg et al. 2017, section 2.1)."""
        assert self.optimizer is not None
        loss = (self(state, labels) - target).square().sum() / max(len(labels), 1)
        self.optimizer.zero_grad()
        loss.backward()
        loss = self.average(loss, len(labels))
        self.step()
        return loss.detach()


class ClassTerm(nn.Module):
    """Adds a learnt vector for each class to features, which is how an estimator sees the label (cDNI).

    For ``shape`` (C, H, W) the weight is ``[classes, H, W, C]``, in the memory order of the features.
    """

    def __init__(self, classes: int, shape: Shape) -> None:
        super().__init__()
        channels, *image = shape
        self.weight = nn.Parameter(torch.zeros(classes, *image, channels))

    @override
    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return features + self.weight[labels].movedim(-1, 1).to(features.dtype)


class DenseSyntheticGradient(SyntheticGradient):
    """Linear layers with ReLU between them, on the flattened state (``mlp``; without hidden layers ``linear``).

    If ``conditional``, a `ClassTerm` is added to each output.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        hidden: Sequence[int],
        conditional: bool,
        seed: int,
        *place: str | int,
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        widths = [size, *hidden, size]
        self.layers = nn.ModuleList(
            Linear(a, b, seed, *place, i, gain=2**0.5 if i < len(hidden) else 0.0)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.terms = nn.ModuleList(ClassTerm(classes, (width,)) for width in widths[1:] if conditional)

    @override
    def forward(self, state: Tensor, labels: Tensor) -> Tensor:
        return _layers(state.flatten(1), labels, self.layers, self.terms).view(state.shape)


class ConvSyntheticGradient(SyntheticGradient):
    """Convolutions with ReLU between them, at the resolution of the state; the last one is linear (``conv``).

    If ``conditional``, hidden layers get a term for each class and channel, the output one for each pixel as well.
    """

    def __init__(
        self,
        shape: Shape,
        classes: int,
        hidden: Sequence[int],
        conditional: bool,
        kernel_size: int,
        seed: int,
        *place: str | int,
    ) -> None:
        super().__init__()
        widths = [shape[0], *hidden, shape[0]]
        self.layers = nn.ModuleList(
            Conv(a, b, kernel_size, seed, *place, i, gain=2**0.5 if i < len(hidden) else 0.0)
            for i, (a, b) in enumerate(pairwise(widths))
        )
        shapes = [*((width, 1, 1) for width in hidden), shape]
        self.terms = nn.ModuleList(ClassTerm(classes, s) for s in shapes if conditional)

    @override
    def forward(self, state: Tensor, labels: Tensor) -> Tensor:
        return _layers(state, labels, self.layers, self.terms)


def _layers(x: Tensor, labels: Tensor, layers: nn.ModuleList, terms: nn.ModuleList) -> Tensor:
    """Applies the layers with ReLU between them, and the class terms if there are any."""
    for i, layer in enumerate(layers):
        x = layer(x)
        if terms:
            x = terms[i](x, labels)
        if i + 1 < len(layers):
            x = F.relu(x, inplace=bool(terms))
    return x


def synthetic_gradient(
    name: str,
    shape: Shape,
    classes: int,
    hidden: Sequence[int],
    conditional: bool,
    kernel_size: int,
    seed: int,
    *place: str | int,
) -> Estimator:
    """Builds an estimator.

    Args:
        name: ``linear``, ``mlp``, ``conv`` or ``package.module.Class``.
        shape: of a state, without the batch.
        classes: how many.
        hidden: the widths of hidden layers.
        conditional: whether the estimator uses the labels.
        kernel_size: of convolutions.
        seed, place: of the random stream of the initial values.

    Raises:
        ValueError: for a name that does not exist, or ``conv`` for states that are not images.

    >>> estimator = synthetic_gradient("mlp", (8,), 3, [16], True, 3, 0)
    >>> estimator.estimate(torch.zeros(10, 8), torch.zeros(10, dtype=torch.long), time=0.5).shape
    torch.Size([10, 8])
    """
    match name:
        case "linear":
            return DenseSyntheticGradient(shape, classes, (), conditional, seed, *place)
        case "mlp":
            return DenseSyntheticGradient(shape, classes, hidden, conditional, seed, *place)
        case "conv":
            shape = fitting(name, shape, "estimator")
            return ConvSyntheticGradient(shape, classes, hidden, conditional, kernel_size, seed, *place)
        case _:
            kind: Callable[..., Estimator] = _outside(name)
            with seeded(seed, *place) as own:
                return kind(
                    shape=shape, classes=classes, hidden=hidden, conditional=conditional, kernel_size=kernel_size,
                    seed=own,
                )  # fmt: skip


def fitting(name: str, shape: Shape, section: str) -> Shape:
    """The shape of a state, if what ``strategy.<section>.name`` chooses fits it.

    Raises:
        ValueError: for ``conv`` and states that are not images.
    """
    if name == "conv" and len(shape) != 3:
        raise ValueError(
            f"strategy.{section}.name=conv needs a convolutional network (model.kernel=conv); use mlp or linear"
        )
    return shape


def shares_lessons(name: str) -> bool:
    """Whether the replicas of an estimator learn the same, which they do if it does not override `learn`."""
    if name in READY_MADE:
        return True
    kind = _outside(name)
    return issubclass(kind, SyntheticGradient) and kind.learn is SyntheticGradient.learn


def _outside(name: str) -> type[Estimator]:
    if "." not in name:
        raise ValueError(
            f"strategy.estimator.name={name} is unknown; choose linear, mlp, conv or package.module.Class"
        )
    return load_class(name, "strategy.estimator.name", Estimator)  # type: ignore[type-abstract]


def prediction_cost(name: str, shape: Shape, hidden: Sequence[int], kernel_size: int) -> float:
    """Multiplications per sample of one prediction; arguments as in `synthetic_gradient`.

    >>> prediction_cost("mlp", (8,), [16], 3)  # 8 * 16 + 16 * 8
    256.0
    """
    if name not in READY_MADE:
        return _outside(name).cost(shape, hidden, kernel_size)
    taps = kernel_size**2 * math.prod(shape[1:]) if name == "conv" else 1
    return float(taps * sum(a * b for a, b in pairwise(_widths(name, shape, hidden))))


def prediction_values(name: str, shape: Shape, hidden: Sequence[int]) -> int:
    """Elementwise operations per sample of one prediction: one for each output of a layer."""
    if name not in READY_MADE:
        return 0  # included in its cost
    pixels = math.prod(shape[1:]) if name == "conv" else 1
    return pixels * sum(_widths(name, shape, hidden)[1:])


def _widths(name: str, shape: Shape, hidden: Sequence[int]) -> list[int]:
    size = shape[0] if name == "conv" else math.prod(shape)
    return [size, *(() if name == "linear" else hidden), size]
