"""The samples of the objective: all training samples, or some that are drawn for each iteration."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sglight.errors import UserError
from sglight.networks.seeding import generator
from sglight.strategies.pvd.objective import Chunk

BATCH = 256  # the batch size for loaders that have none
GIB = 2**30


class Samples:
    """Chooses the samples over which f is the mean.

    Args:
        size: how many to draw for each iteration; None for all.
        seed: of the draws.

    Attributes:
        total: the size of the training set; 0 until it has been counted.
    """

    def __init__(self, size: int | None, seed: int) -> None:
        self.size, self.seed = size, seed
        self.total = 0

    @property
    def are_fixed(self) -> bool:
        """Whether they are the same in all iterations."""
        return self.size is None

    def choose(self, loader: Any, iteration: int, like: Tensor) -> Chunk | None:
        """The samples of an iteration; None if they are those of the one before.

        Args:
            loader: of the training set.
            iteration: its number.
            like: a tensor with the type and device for the inputs.
        """
        if self.total and self.are_fixed:
            return None
        batches, rows = in_order(loader), None
        self.total = self.total or sum(len(labels) for _, labels in batches)
        if self.size is not None:
            rows = draw(self.total, self.size, self.seed, iteration)
        return gather(batches, rows, like)


def check_memory(data: Any, samples: int | None) -> None:
    """Refuse an objective whose samples need more memory than ``dataset.memory_limit``.

    Args:
        data: the data module.
        samples: of the objective; None for all.

    Raises:
        UserError: that names the key.
    """
    limit = getattr(data, "memory_limit", None)
    if limit is None:
        return
    sample = 4 * math.prod(data.shape)  # float32
    count = data.train_size if samples is None else min(samples, data.train_size)
    if count * sample > limit * GIB:
        raise UserError(
            f"strategy=pvd holds the {count} samples of its objective in memory, {count * sample / GIB:.3g} GiB, more "
            f"than dataset.memory_limit={limit:g}: raise it, or set strategy.objective_samples to at most "
            f"{max(1, int(limit * GIB / sample))}"
        )


def in_order(loader: Any) -> Iterable[Any]:
    """A loader of the same samples in a fixed order, without shuffling and without dropping the last batch.

    It is made by the loader's method ``sequential``, or from torch's `DataLoader`; other loaders are returned as they
    are.
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
    """Joins all samples of some batches, or those with the ascending numbers ``rows``; type and device as ``like``."""
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
    """Draws ``size`` of the numbers 0 ... ``count`` - 1, ascending; depends on seed and iteration alone."""
    order = torch.randperm(count, generator=generator(seed, "objective", iteration))
    return order[:size].sort().values


def shares(samples: Chunk, parts: int, largest: int) -> list[list[Chunk]]:
    """Divides samples into chunks of at most ``largest``, and the chunks, in order, into ``parts`` of equal size."""
    inputs, labels = samples
    size = min(largest, math.ceil(len(labels) / parts))
    chunks = list(zip(inputs.split(size), labels.split(size), strict=True))
    bounds = [len(chunks) * part // parts for part in range(parts + 1)]
    return [chunks[a:b] for a, b in pairwise(bounds)]
