"""The LightningDataModule on which every data set is based: splits, placement on the device, loaders."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from sglight.compat.lightning import batches_processed
from sglight.config.datasets import at_least
from sglight.config.datasets import fraction as check_fraction
from sglight.data.augment import Augmentation
from sglight.data.loader import Array, Batch, BatchLoader, Resident, Samples, Streamed
from sglight.data.statistics import slabs
from sglight.errors import UserError

GIB = 2**30
SPLITS_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}


@dataclass(frozen=True)
class Part:
    """One split: rows of an array [n', ...] of uint8 pixels or of floats, and their labels [n]."""

    x: Array
    rows: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]

    @property
    def nbytes(self) -> int:
        """The memory that its samples need: one byte for a pixel, four for a float."""
        itemsize = 1 if self.x.dtype == np.uint8 else 4
        return len(self.rows) * math.prod(self.x.shape[1:]) * itemsize

    def read(self) -> Tensor:
        """All samples [n, ...], in one pass over the array."""
        dtype = np.uint8 if self.x.dtype == np.uint8 else np.float32
        values = np.empty((len(self.rows), *self.x.shape[1:]), dtype)
        for slab in slabs(self.x.shape, self.x.dtype.itemsize):
            first, last = np.searchsorted(self.rows, (slab.start, slab.stop))
            if first < last:
                values[first:last] = self.x[slab][self.rows[first:last] - slab.start]
        return torch.from_numpy(values)


@dataclass(frozen=True)
class Contents:
    """A data set before its samples are read into memory.

    Attributes:
        parts: the splits "train", "val" and "test".
        class_names: one for each class number.
        mean, std: of the training samples, for each channel or feature; pixels as numbers in [0, 1].
        standardised: whether the samples are (x - mean) / std already.
    """

    parts: dict[str, Part]
    class_names: list[str]
    mean: list[float]
    std: list[float]
    standardised: bool = False


class DataModule(LightningDataModule):
    """Serves a data set as whole batches on the device of the trainer; subclasses implement `open()`.

    After `prepare_data()` and `setup("fit")` or `setup("test")` these attributes are set: `shape` (of a sample),
    `classes`, `class_names`, `mean`, `std` (per channel, pixels as numbers in [0, 1]), `pixels` (whether samples are
    bytes), `train_size`, `val_size`, `test_size`.

    Attributes:
        inputs: set it to False before `setup` if only the labels are needed; then no input is read and every x is
            None.
        origin: where the samples come from, for messages.
        notes: what the user should know about the data, for example files that were ignored; filled by `open()`.
    """

    shape: tuple[int, ...]
    class_names: list[str]
    mean: list[float]
    std: list[float]
    pixels: bool
    train_size: int
    val_size: int
    test_size: int

    def __init__(
        self,
        name: str,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        data_seed: int,
        augmentation: Augmentation | None = None,
        memory_limit: float = math.inf,
    ) -> None:
        super().__init__()
        at_least("dataset.batch_size", batch_size, 1)
        at_least("dataset.eval_batch_size", eval_batch_size, 1)
        at_least("seed", seed, 0)
        at_least("dataset.data_seed", data_seed, 0)
        if not memory_limit > 0:
            raise UserError(f"dataset.memory_limit={memory_limit} must be a number of GiB above 0")
        self.name: str = name
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.data_seed = seed, data_seed
        self.augmentation = augmentation
        self.memory_limit = memory_limit
        self.inputs = True
        self.origin = f"dataset={name}"
        self.notes: list[str] = []
        self._contents: Contents | None = None
        self._samples: dict[str, Samples] = {}
        self._labels: dict[str, Tensor] = {}

    def open(self) -> Contents:
        """The splits of the data set; called once in each process, after `prepare_data`."""
        raise NotImplementedError

    def contents(self) -> Contents:
        """What `open` returned, checked; `open` is called the first time only.

        Raises:
            UserError: there is one class only, or all training samples are equal.
        """
        if self._contents is None:
            contents = self.open()
            self._check_contents(contents)
            self._contents = contents
        return self._contents

    def _check_contents(self, contents: Contents) -> None:
        if len(contents.class_names) < 2:
            raise UserError(
                f"{self.origin} has one class, {contents.class_names[0]}: at least two are needed"
            )
        if not any(contents.std):
            raise UserError(
                f"{self.origin}: the training samples are all the same (standard deviation 0 everywhere), so that "
                "nothing can be learnt: look at what the files hold"
            )

    def _check_augmentation(self, augmentation: Augmentation) -> None:
        if len(self.shape) != 3:
            raise UserError(f"dataset.augment=true needs pictures, not samples of shape {list(self.shape)}")
        height, width = self.shape[1:]
        if augmentation.padding >= min(height, width):
            raise UserError(
                f"dataset.crop_padding={augmentation.padding} must be less than the size of the pictures, "
                f"{width} x {height}: crops would hold nothing of them"
            )

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def device(self) -> torch.device:
        """The device of the batches: that of the trainer."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def setup(self, stage: str | None = None) -> None:
        """Loads the splits that Lightning's `stage` needs, unless they are loaded."""
        contents = self.contents()
        self.shape = tuple(contents.parts["train"].x.shape[1:])
        self.class_names, self.mean, self.std = contents.class_names, contents.mean, contents.std
        self.pixels = contents.parts["train"].x.dtype == np.uint8
        self.train_size, self.val_size, self.test_size = (
            len(contents.parts[split].y) for split in ("train", "val", "test")
        )
        if self.augmentation is not None:
            self._check_augmentation(self.augmentation)
        for split in ("train", "val", "test") if stage is None else SPLITS_OF_STAGE[stage]:
            self._load(split)

    def train_dataloader(self) -> BatchLoader:
        """Training batches, in a new random order each epoch (but not with Lightning's `overfit_batches`)."""
        overfits = bool(getattr(self.trainer, "overfit_batches", 0))
        return self._loader("train", self.batch_size, shuffle=not overfits)

    def val_dataloader(self) -> BatchLoader:
        """Validation batches, always in the same order."""
        return self._loader("val", self.eval_batch_size)

    def test_dataloader(self) -> BatchLoader:
        """Test batches, always in the same order."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> BatchLoader:
        """The test batches, with their labels."""
        return self.test_dataloader()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The batch itself: it is on the device already."""
        return batch

    def _load(self, split: str) -> None:
        part = self.contents().parts[split]
        if split not in self._samples:
            self._samples[split] = self._read(split, part)
            self._labels[split] = torch.from_numpy(part.y)
        samples = self._samples[split]
        if isinstance(samples, Resident):
            samples.x = self._placed(samples.x)
        self._labels[split] = self._labels[split].to(self.device)

    def _read(self, split: str, part: Part) -> Samples:
        limit = self.memory_limit * GIB
        if split not in residents(self.contents().parts, limit):
            return Streamed(part.x, part.rows, limit / 4)
        if not self.inputs:
            return Resident(torch.empty(len(part.rows), 0))
        return Resident(part.read())

    def _placed(self, x: Tensor) -> Tensor:
        """x on the device if it takes less than half of the free memory there, else where it is."""
        if self.device.type == "cuda" and x.device != self.device:
            free, _ = torch.cuda.mem_get_info(self.device)
            if x.nbytes > free / 2:
                return x
        return x.to(self.device)

    def _loader(self, split: str, batch_size: int, shuffle: bool = False) -> BatchLoader:
        if split not in self._samples:
            self._load(split)
        pixels = self.contents().parts[split].x.dtype == np.uint8
        scale, shift = None, None
        if not self.contents().standardised:
            scale, shift = affine(self.mean, self.std, len(self.shape), pixels, self.device)
        return BatchLoader(
            self._samples[split],
            self._labels[split],
            batch_size,
            scale=scale,
            shift=shift,
            shuffle=shuffle,
            seed=self.seed,
            augmentation=self.augmentation if split == "train" else None,
            position=self._position if split == "train" and self.trainer is not None else None,
            inputs=self.inputs,
        )

    def _position(self) -> int:
        # Batches that are done, not those that were served: after an error the resumed run repeats that batch.
        assert self.trainer is not None
        return batches_processed(self.trainer)


def affine(
    mean: list[float], std: list[float], dimensions: int, pixels: bool, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift with x * scale + shift = (x - mean) / std; (None, None) if that changes nothing.

    Args:
        mean, std: one for each channel or feature.
        dimensions: of a sample: 1 for features [F], 3 for pictures [C, H, W].
        pixels: whether x are bytes; mean and std are those of x / 255 then.
        device: of the result, which has shape [F] or [C, 1, 1].
    """
    shape = (-1, *[1] * (dimensions - 1))
    spread = torch.tensor(std, dtype=torch.float64)
    spread = torch.where(spread > 0, spread, 1.0)
    scale = 1 / (spread * (255 if pixels else 1))
    shift = -torch.tensor(mean, dtype=torch.float64) / spread
    if bool((scale == 1).all()) and bool((shift == 0).all()):
        return None, None
    return (value.to(torch.float32).view(shape).to(device) for value in (scale, shift))  # type: ignore[return-value]


def residents(parts: dict[str, Part], limit: float) -> set[str]:
    """The splits to keep in memory: all if they fit into `limit` bytes, else the smallest that fit into half of it."""
    if sum(part.nbytes for part in parts.values()) <= limit:
        return set(parts)
    chosen, budget = set(), limit / 2
    for split in sorted(parts, key=lambda split: parts[split].nbytes):
        budget -= parts[split].nbytes
        if budget >= 0:
            chosen.add(split)
    return chosen


def stratified(
    labels: np.ndarray[Any, Any], fraction: float, seed: int, key: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Splits the rows 0 ... n - 1 at random into (kept, held out), both ascending, with the same shares of classes.

    Args:
        labels: [n].
        fraction: the part that is held out.
        seed: of the draw.
        key: the config key of the fraction, for messages.

    Raises:
        UserError: a class has one sample only, or one side would have too few samples.
    """
    check_fraction(key, fraction)
    classes, counts = np.unique(labels, return_counts=True)
    count = math.ceil(fraction * len(labels))
    if counts.min() < 2:
        raise UserError(
            f"class {classes[counts.argmin()]} has one sample, which {key}={fraction} cannot split: add samples"
        )
    if min(count, len(labels) - count) < len(classes):
        raise UserError(
            f"{key}={fraction} holds out {count} of {len(labels)} samples: too few on one side for "
            f"{len(classes)} classes"
        )
    # The same draws as scikit-learn's `train_test_split` with `stratify`, which takes a second to import.
    draw = np.random.RandomState(seed % 2**32)
    kept = _shares(counts, len(labels) - count, draw)
    held_out = _shares(counts - kept, count, draw)
    members = np.split(np.argsort(labels, kind="stable"), counts.cumsum()[:-1])
    drawn = [rows[draw.permutation(len(rows))] for rows in members]
    chosen = zip(drawn, kept, kept + held_out, strict=True)
    parts = [np.split(rows[:end], [middle]) for rows, middle, end in chosen]
    first, second = (np.sort(np.concatenate(part)) for part in zip(*parts, strict=True))
    return first, second


def _shares(counts: np.ndarray[Any, Any], total: int, draw: np.random.RandomState) -> np.ndarray[Any, Any]:
    """How many samples of each class are among ``total``: by largest remainders, ties broken at random.

    Args:
        counts: of all samples, by class.
        total: to be chosen.
        draw: breaks the ties.
    """
    exact = counts / counts.sum() * total
    shares = np.floor(exact)
    remainders, missing = exact - shares, int(total - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if missing == 0:
            break
        (tied,) = np.nonzero(remainders == remainder)
        raised = draw.choice(tied, size=min(len(tied), missing), replace=False)
        shares[raised] += 1
        missing -= len(raised)
    return shares.astype(int)
