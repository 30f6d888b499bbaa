"""Loaders that make whole batches by indexing: no Python code per sample, no collating, no worker processes."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sglight.data.augment import Augmentation

BLOCK_BYTES = 1 << 20  # small batches are gathered several at once, as many as fit into the cache
Batch = tuple[Tensor | None, Tensor]


class Array(Protocol):
    """An array that can be read by slices of rows: a NumPy array, or an array in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, with the samples first."""
        ...

    @property
    def dtype(self) -> Any:
        """The NumPy type of the numbers."""
        ...

    def __getitem__(self, rows: slice) -> Any: ...


class Samples(Protocol):
    """The inputs of one split. Samples are numbered 0 ... n - 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        ...

    def __len__(self) -> int: ...
    def order(self, generator: torch.Generator) -> Tensor:
        """A random order of all samples: their numbers [n]."""
        ...

    def blocks(self, order: Tensor, start: int, block: int) -> Iterator[Tensor]:
        """The inputs of the samples order[start:], `block` at a time, in new tensors."""
        ...


class Resident:
    """Inputs x [n, ...] that are kept in memory, on the device if they fit."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.shape = tuple(x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def order(self, generator: torch.Generator) -> Tensor:
        """A random order of all samples: their numbers [n]."""
        return torch.randperm(len(self.x), generator=generator)

    def blocks(self, order: Tensor, start: int, block: int) -> Iterator[Tensor]:
        """The inputs of the samples order[start:], `block` at a time, in new tensors."""
        for numbers in order.to(self.x.device)[start:].split(block):
            yield self.x.index_select(0, numbers)


class Streamed:
    """Inputs that stay in a file and are read in shuffled chunks.

    The samples are divided into slabs of neighbours. An epoch goes through the slabs in random order, a group of them
    at a time, and shuffles the samples within a group. So reads are contiguous, and the order is reproducible.

    Args:
        array: n' samples in a file.
        rows: the rows of the array that belong to this split [n], ascending.
        memory: bytes of samples that may be in memory at once.
        slab: samples in a slab.
    """

    def __init__(self, array: Array, rows: np.ndarray, memory: float, slab: int = 256) -> None:
        self.array = array
        self.rows = rows
        self.shape = tuple(array.shape[1:])
        self.dtype = torch.uint8 if array.dtype == np.uint8 else torch.float32
        sample = math.prod(self.shape) * self.dtype.itemsize
        # Room for two groups of slabs, because a block may extend over two of them.
        self.slab = max(1, min(slab, len(rows), int(memory / sample / 4)))
        self.group = max(1, int(memory / sample / self.slab / 2))

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, generator: torch.Generator) -> Tensor:
        """A random order of all samples: the slabs are shuffled, then the samples within each group of slabs."""
        slabs = torch.randperm(math.ceil(len(self) / self.slab), generator=generator)
        groups = []
        for group in slabs.split(self.group):
            numbers = (group[:, None] * self.slab + torch.arange(self.slab)).flatten()
            numbers = numbers[numbers < len(self)]
            groups.append(numbers[torch.randperm(len(numbers), generator=generator)])
        return torch.cat(groups)

    def blocks(self, order: Tensor, start: int, block: int) -> Iterator[Tensor]:
        """The inputs of the samples order[start:], `block` at a time, in new tensors."""
        slabs = math.ceil(len(self) / self.slab)
        place = torch.full((slabs,), -1)  # where in the pool a slab lies
        todo = torch.bincount(order[start:] // self.slab, minlength=slabs)  # its samples not yet served
        places = min(slabs, 2 * self.group)
        free = list(range(places))
        pool = torch.empty(places * self.slab, *self.shape, dtype=self.dtype)
        for numbers in order[start:].split(block):
            owners = numbers // self.slab
            for slab in owners.unique().tolist():
                if place[slab] < 0:
                    if not free:
                        free, pool = self._grow(pool)
                    place[slab] = free.pop()
                    self._read(slab, pool[place[slab] * self.slab :])
            yield pool.index_select(0, place[owners] * self.slab + numbers % self.slab)
            todo -= torch.bincount(owners, minlength=slabs)
            for slab in owners.unique().tolist():
                if todo[slab] == 0:
                    free.append(int(place[slab]))

    def _grow(self, pool: Tensor) -> tuple[list[int], Tensor]:
        """The places and the memory of one more group of slabs, which a batch larger than a group needs."""
        more = torch.empty(self.group * self.slab, *self.shape, dtype=self.dtype)
        places = len(pool) // self.slab
        return list(range(places, places + self.group)), torch.cat([pool, more])

    def _read(self, slab: int, target: Tensor) -> None:
        rows = self.rows[slab * self.slab : (slab + 1) * self.slab]
        first = int(rows[0])
        values = self.array[slice(first, int(rows[-1]) + 1)]
        chosen = values[rows - first].astype(np.uint8 if self.dtype == torch.uint8 else np.float32)
        target[: len(rows)] = torch.from_numpy(chosen)


class EpochSampler:
    """Random generators of an epoch, which depend on (seed, epoch) alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; Lightning calls it before each one."""
        self.epoch = epoch

    def generator(self, stream: int) -> torch.Generator:
        """A new generator for a `stream`: 0 for the order of the samples, 1 for the augmentation."""
        state = np.random.SeedSequence((self.seed, self.epoch, stream)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)


class BatchLoader:
    """Whole batches (x, y): x float32 [B, *shape], normalised as x * scale + shift; y int64 [B].

    Order and augmentation depend on (seed, epoch, batch) alone, and `state_dict` contains the next batch, so that a
    resumed run sees the batches of the uninterrupted one. The last batch may be smaller; it is not dropped.

    Args:
        samples: the inputs.
        labels: [n] int64, on the device.
        batch_size: B.
        scale, shift: broadcast to [B, *shape], on the device; None: x is not normalised.
        shuffle: whether each epoch has a new random order.
        seed: of order and augmentation.
        augmentation: applied to the inputs before they are normalised.
        position: returns how many batches of the epoch are done, for `state_dict`; None: those that were served.
        inputs: if False, every x is None, for workers that need only the labels.

    >>> import torch
    >>> loader = BatchLoader(Resident(torch.zeros(5, 2)), torch.arange(5), batch_size=2)
    >>> [y.tolist() for x, y in loader]
    [[0, 1], [2, 3], [4]]
    """

    batch_sampler = None  # Lightning reads this attribute

    def __init__(
        self,
        samples: Samples,
        labels: Tensor,
        batch_size: int,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        shuffle: bool = False,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        position: Callable[[], int] | None = None,
        inputs: bool = True,
    ) -> None:
        self.samples = samples
        self.labels = labels
        self.batch_size = batch_size
        self.scale, self.shift = scale, shift
        self.shuffle = shuffle
        self.sampler = EpochSampler(seed)
        self.augmentation = augmentation
        self.inputs = inputs
        self._position = position
        self._epoch = self._batch = 0
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: Lightning calls iter() before it sets the epoch, so the epoch is read at the first batch.
        self._epoch, self._batch = self.sampler.epoch, self._first_batch()
        per_block = self._batches_per_block()
        # Blocks start at the same batches in a resumed run, so that memory alignment and rounding are the same.
        start, skip = divmod(self._batch, per_block)
        block = per_block * self.batch_size
        order = self._order()
        labels = order.to(self.labels.device)[start * block :].split(block)
        for numbers, x in zip(labels, self._inputs(order, start, block), strict=True):
            targets = self.labels.index_select(0, numbers).split(self.batch_size)
            inputs = [None] * len(targets) if x is None else x.split(self.batch_size)
            for batch in list(zip(inputs, targets, strict=True))[skip:]:
                self._batch += 1
                yield batch
            skip = 0

    def sequential(self) -> "BatchLoader":
        """A loader of the same samples without shuffling and augmentation."""
        return BatchLoader(
            self.samples, self.labels, self.batch_size, scale=self.scale, shift=self.shift, inputs=self.inputs
        )

    def state_dict(self) -> dict[str, int]:
        """The epoch and the batch with which to continue."""
        batch = self._batch if self._position is None else self._position()
        return {"epoch": self._epoch, "batch": batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes that epoch start at that batch; other epochs start at their first batch."""
        self._resume = (state["epoch"], state["batch"])

    def _first_batch(self) -> int:
        epoch, batch = self._resume or (-1, 0)
        self._resume = None
        return batch if epoch == self.sampler.epoch and batch < len(self) else 0

    def _order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self.labels))
        return self.samples.order(self.sampler.generator(0))

    def _batches_per_block(self) -> int:
        if self.augmentation is not None:
            return 1
        batch_bytes = 4 * self.batch_size * max(1, math.prod(self.samples.shape))
        return max(1, BLOCK_BYTES // batch_bytes)

    def _inputs(self, order: Tensor, start: int, block: int) -> Iterator[Tensor | None]:
        if not self.inputs:
            yield from [None] * (math.ceil(len(order) / block) - start)
            return
        blocks = self.samples.blocks(order, start * block, block)
        if self.augmentation is None:
            yield from map(self._normalised, blocks)
            return
        draw = self.augmentation.draw(len(order), self.batch_size, self.sampler.generator(1))
        for batch, x in enumerate(blocks, start):
            x = x.to(self.labels.device, non_blocking=True)
            yield self._normalised(self.augmentation(x, draw, batch, self.batch_size))

    def _normalised(self, x: Tensor) -> Tensor:
        x = x.to(self.labels.device, non_blocking=True).to(torch.float32)
        if self.scale is None or self.shift is None:
            return x
        return x.mul_(self.scale).add_(self.shift)
