"""The objective of parallel variable distribution, as a function of the blocks of a network's weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sglight.compat.torch import add_, copy_
from sglight.networks import Stage
from sglight.networks.regularisers import penalty
from sglight.strategies.evaluation import hits
from sglight.strategies.loss import Loss
from sglight.strategies.recorder import Recorder

Point = list[Tensor]  # a value of all variables: one vector for each block
Chunk = tuple[Tensor, Tensor]  # a batch of the network: inputs [n, ...] and labels [n]


class Sums(NamedTuple):
    """The summed loss of a chunk, and the number of samples that are classified correctly."""

    loss: float
    hits: float


class Evaluated(NamedTuple):
    """A point, the objective there, and the accuracy on its samples."""

    point: Point
    value: float
    accuracy: float = math.nan

    def no_worse_than(self, other: Evaluated) -> bool:
        """Whether the objective is at most that of another point; NaN is worse."""
        return self.value <= other.value


class Objective:
    """f(x) = 1/n sum_i loss_i(x) + penalties(x) + decay/2 ||x||^2, where block j of x are the weights of stage j.

    The normaliser n is that of the loss: the number of samples, or the sum of their class weights. To evaluate f at a
    point, the point is written into the parameters of the stages. Losses are summed chunk by chunk, and chunks without
    rounding, so that it does not matter which worker has computed which chunk.

    Args:
        stages: of one network, in order.
        loss: of a sample.
        regularisation: weights of the penalties in `sglight.networks.regularisers.penalty`.
        decay: weight of the squared norm.
        recorder: times the computations of each processor.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        loss: Loss,
        regularisation: Mapping[str, float],
        decay: float,
        recorder: Recorder,
    ) -> None:
        self._stages, self._loss, self._regularisation, self._decay = stages, loss, regularisation, decay
        self._recorder = recorder
        self._parameters = [list(stage.parameters()) for stage in stages]

    def read(self) -> Point:
        """The present weights."""
        return [flat([p.detach() for p in block]) for block in self._parameters]

    @torch.no_grad()
    def write(self, x: Point) -> None:
        """Set the weights."""
        for block, values in zip(self._parameters, x, strict=True):
            parts = values.split([p.numel() for p in block])
            copy_(block, [v.view_as(p) for v, p in zip(parts, block, strict=True)])

    @torch.no_grad()
    def sums(self, x: Point, chunks: Iterable[Chunk], processor: int = 0) -> list[Sums]:
        """The `Sums` of each chunk at x."""
        self.write(x)
        return [self._forward(chunk, processor)[1] for chunk in chunks]

    def loss_gradient(
        self, x: Point, chunks: Iterable[Chunk], blocks: Sequence[int] | None = None, processor: int = 0
    ) -> tuple[list[Sums], Point]:
        """The `Sums` of each chunk at x, and the gradient of their total loss for some blocks (None for all)."""
        self.write(x)
        wanted = self._wanted(blocks)
        parameters, sums = [p for block in wanted for p in block], list[Sums]()
        total = [torch.zeros_like(p) for p in parameters]
        for chunk in chunks:
            loss, known = self._forward(chunk, processor)
            sums.append(known)
            with self._recorder.phase("backward", processor):
                add_(total, torch.autograd.grad(loss, parameters))
        return sums, _in_blocks(total, wanted)

    def penalties(self, x: Point, blocks: Sequence[int] | None = None) -> tuple[float, Point]:
        """The penalties at x, with the squared norm, and their gradient for some blocks (None for all)."""
        self.write(x)
        wanted = self._wanted(blocks)
        parameters = [p for block in wanted for p in block]
        gradients = [self._decay * p.detach() for p in parameters]
        value = self._decay / 2 * math.fsum(inner(block, block) for block in x) if self._decay else 0.0
        extra = penalty(self._stages, **self._regularisation)  # type: ignore[arg-type]
        if extra is not None and parameters:
            more = torch.autograd.grad(extra, parameters, allow_unused=True, materialize_grads=True)
            add_(gradients, more)
        return value + (0.0 if extra is None else float(extra.detach())), _in_blocks(gradients, wanted)

    def on_batch(
        self, x: Point, chunks: Sequence[Chunk], blocks: Sequence[int], processor: int = 0
    ) -> tuple[Sums, float, Point]:
        """f on a batch instead of its samples: the sums, the value, and the gradient for some blocks."""
        n = self.normaliser(chunks)
        sums, gradient = self.loss_gradient(x, chunks, blocks, processor)
        total = totals(sums)
        penalties, extra = self.penalties(x, blocks)
        return total, total.loss / n + penalties, mean_plus(gradient, n, extra)

    def normaliser(self, chunks: Iterable[Chunk]) -> float:
        """The number by which the sum of losses is divided for the mean."""
        return math.fsum(self._loss.normaliser(labels) for _, labels in chunks)

    def _forward(self, chunk: Chunk, processor: int) -> tuple[Tensor, Sums]:
        state, labels = chunk
        with self._recorder.phase("forward", processor):
            for stage in self._stages:
                state = stage(state)
            loss = self._loss.total(state, labels)
            known = torch.stack([loss.detach().double(), hits(state.detach(), labels).double()]).tolist()
        return loss, Sums(*known)

    def _wanted(self, blocks: Sequence[int] | None) -> list[list[nn.Parameter]]:
        return self._parameters if blocks is None else [self._parameters[j] for j in blocks]


def totals(sums: Iterable[Sums]) -> Sums:
    """The sum over all chunks, rounded once."""
    return Sums(*(math.fsum(column) for column in zip(*sums, strict=True)))


def inner(a: Tensor, b: Tensor) -> float:
    """The inner product, in double precision."""
    return float(torch.dot(a.double(), b.double()))


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Tensors joined to one vector."""
    return torch.cat([part.reshape(-1) for part in parts])


def mean_plus(total: Point, normaliser: float, extra: Point) -> Point:
    """total / normaliser + extra."""
    return [t / normaliser + e for t, e in zip(total, extra, strict=True)]


def _in_blocks(values: Sequence[Tensor], blocks: Sequence[Sequence[Tensor]]) -> Point:
    """Joins the values of the tensors of each block to one vector."""
    rest = iter(values)
    return [flat([next(rest) for _ in block]) for block in blocks]
