"""The objective that parallel variable distribution minimises: a function of a network's weights, in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sglight.networks import Stage
from sglight.networks.regularisers import penalty
from sglight.networks.seeding import generator
from sglight.strategies.recorder import Recorder

# A value of all variables: one vector a block.
Point = list[Tensor]
# Inputs [n, ...] and labels [n] that pass the network at once.
Chunk = tuple[Tensor, Tensor]


# Samples that are read at once where nobody says how many.
BATCH = 256


class Sums(NamedTuple):
    """Summed loss and hits of a chunk of samples."""

    loss: float
    hits: float


class Objective:
    """f(x) = 1/n sum_i loss_i(x) + penalties(x) + decay/2 ||x||^2, where block j of x is the weights of stage j.

    The stages' parameters are its workspace: evaluating leaves the point there. Samples are summed chunk by chunk in
    their order, chunks without rounding, so that it does not matter who has computed which chunk.

    Args:
        stages: of one network, in order.
        regularisation: weights of the penalties in `sglight.networks.regularisers.penalty`.
        decay: weight of the squared norm.
        recorder: times what is computed, for the processor that is named.
    """

    def __init__(
        self, stages: Sequence[Stage], regularisation: Mapping[str, float], decay: float, recorder: Recorder
    ) -> None:
        self._stages, self._regularisation, self._decay = stages, regularisation, decay
        self._recorder = recorder
        self._parameters = [list(stage.parameters()) for stage in stages]

    def read(self) -> Point:
        """The weights as they are."""
        return [flat([p.detach() for p in block]) for block in self._parameters]

    @torch.no_grad()
    def write(self, x: Point) -> None:
        """Give the network these weights."""
        for block, values in zip(self._parameters, x, strict=True):
            parts = values.split([p.numel() for p in block])
            torch._foreach_copy_(
                list[Tensor](block), [v.view_as(p) for v, p in zip(parts, block, strict=True)]
            )

    @torch.no_grad()
    def sums(self, x: Point, chunks: Iterable[Chunk], processor: int = 0) -> list[Sums]:
        """The sums of each chunk."""
        self.write(x)
        return [self._forward(chunk, processor)[1] for chunk in chunks]

    def loss_gradient(
        self, x: Point, chunks: Iterable[Chunk], blocks: Sequence[int] | None = None, processor: int = 0
    ) -> tuple[list[Sums], Point]:
        """The sums of each chunk, and the gradient of the whole sum of losses, of some blocks (None: of all)."""
        self.write(x)
        wanted = self._wanted(blocks)
        parameters, sums = [p for block in wanted for p in block], list[Sums]()
        total = [torch.zeros_like(p) for p in parameters]
        for chunk in chunks:
            loss, known = self._forward(chunk, processor)
            sums.append(known)
            with self._recorder.phase("backward", processor):
                torch._foreach_add_(total, torch.autograd.grad(loss, parameters))
        return sums, _in_blocks(total, wanted)

    def penalties(self, x: Point, blocks: Sequence[int] | None = None) -> tuple[float, Point]:
        """What is added to the mean loss, and its gradient, of some blocks (None: of all)."""
        self.write(x)
        wanted = self._wanted(blocks)
        parameters = [p for block in wanted for p in block]
        gradients = [self._decay * p.detach() for p in parameters]
        value = self._decay / 2 * math.fsum(inner(block, block) for block in x) if self._decay else 0.0
        extra = penalty(self._stages, **self._regularisation)
        if extra is not None and parameters:
            more = torch.autograd.grad(extra, parameters, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(gradients, more)
        return value + (0.0 if extra is None else float(extra.detach())), _in_blocks(gradients, wanted)

    def on_batch(
        self, x: Point, chunks: Sequence[Chunk], blocks: Sequence[int], processor: int = 0
    ) -> tuple[Sums, float, Point]:
        """Of f with a batch for the samples: the sums, the value, and the gradient of some blocks."""
        count = sum(len(labels) for _, labels in chunks)
        sums, gradient = self.loss_gradient(x, chunks, blocks, processor)
        total = totals(sums)
        penalties, extra = self.penalties(x, blocks)
        return total, total.loss / count + penalties, mean_plus(gradient, count, extra)

    def _forward(self, chunk: Chunk, processor: int) -> tuple[Tensor, Sums]:
        state, labels = chunk
        with self._recorder.phase("forward", processor):
            for stage in self._stages:
                state = stage(state)
            loss = F.cross_entropy(state, labels, reduction="sum")
            hits = (state.detach().argmax(1) == labels).sum()
            known = torch.stack([loss.detach().double(), hits.double()]).tolist()
        return loss, Sums(*known)

    def _wanted(self, blocks: Sequence[int] | None) -> list[list[nn.Parameter]]:
        return self._parameters if blocks is None else [self._parameters[j] for j in blocks]


def totals(sums: Iterable[Sums]) -> Sums:
    """The sums over all chunks, rounded once."""
    return Sums(*(math.fsum(column) for column in zip(*sums, strict=True)))


def inner(a: Tensor, b: Tensor) -> float:
    """The inner product, in double precision."""
    return float(torch.dot(a.double(), b.double()))


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector."""
    return torch.cat([part.reshape(-1) for part in parts])


def mean_plus(total: Point, count: int, extra: Point) -> Point:
    """total / count + extra."""
    return [t / count + e for t, e in zip(total, extra, strict=True)]


def _in_blocks(values: Sequence[Tensor], blocks: Sequence[Sequence[Tensor]]) -> Point:
    """The values of all tensors of some blocks as one vector a block."""
    rest = iter(values)
    return [flat([next(rest) for _ in block]) for block in blocks]


def in_order(loader: Any) -> Iterable[Any]:
    """The same batches from a loader each time: unshuffled and whole, where it can be told to.

    A loader that can has a method ``sequential``; of others than torch's own it is assumed that they are so.
    """
    if hasattr(loader, "sequential"):
        loader = loader.sequential()
    elif isinstance(loader, DataLoader) and hasattr(loader.dataset, "__getitem__"):
        size = loader.batch_size
        if size is None and loader.batch_sampler is not None:
            size = getattr(loader.batch_sampler, "batch_size", BATCH)
        loader = DataLoader(loader.dataset, size, collate_fn=loader.collate_fn)
    batches: Iterable[Any] = loader
    return batches


def gather(batches: Iterable[Any], rows: Tensor | None, like: Tensor) -> Chunk:
    """All samples, or those of the ascending numbers ``rows``, in one piece; typed and placed ``like``."""
    inputs, labels, seen = list[Tensor](), list[Tensor](), 0
    for x, y in batches:
        if rows is not None:
            chosen = (rows[(rows >= seen) & (rows < seen + len(y))] - seen).to(y.device)
            seen += len(y)
            x, y = x[chosen], y[chosen]
        inputs.append(x.to(like))
        labels.append(y.to(like.device))
    return torch.cat(inputs), torch.cat(labels)


def draw(count: int, size: int, seed: int, iteration: int) -> Tensor:
    """``size`` of ``count`` sample numbers, ascending, by seed and iteration."""
    order = torch.randperm(count, generator=generator(seed, "objective", iteration))
    return order[:size].sort().values


def shares(samples: Chunk, parts: int, largest: int) -> list[list[Chunk]]:
    """Samples in chunks of at most ``largest``, nearly as many to each of ``parts``; in order, perhaps none."""
    inputs, labels = samples
    size = min(largest, math.ceil(len(labels) / parts))
    chunks = list(zip(inputs.split(size), labels.split(size), strict=True))
    bounds = [len(chunks) * part // parts for part in range(parts + 1)]
    return [chunks[a:b] for a, b in pairwise(bounds)]
