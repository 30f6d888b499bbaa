"""The store: the HDF5 file to which an image set is converted once.

    /                attributes: format, version, name, source, fingerprint, checksum, layout, classes,
                     mean, std, and others of the image set
    /train/images    uint8 [N, C, H, W] (layout "NCHW"), stored contiguously
    /train/labels    int64 [N]
    /train/crc32     uint32 [ceil(N / rows)]: checksums of blocks of `rows` images (`rows` is an attribute)
    /test/...        likewise; may be missing
    /val/...         likewise; may be missing

`mean` and `std` are those of each channel of the training images, as numbers in [0, 1]. The attribute `checksum` of a
group is the SHA-256 of its images and labels, by which stores can be compared. Everything is checked when it is read:
images by the checksums of their blocks, all else by the seal of the file (seal.py).
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.progress import Progress, TaskID

from sglight.data.seal import SEAL_BYTES, Damaged, check_seal, has_signature, seal
from sglight.data.statistics import slabs, statistics
from sglight.errors import UserError

FORMAT = "sglight-images"
VERSION = 2
SPLITS = ("train", "val", "test")
BLOCK_BYTES = 1 << 16
ROOM = 1 << 20  # bytes for all but the samples
Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Blocks:
    """The checksums of an array, one for each block of `rows` rows; the last block may be shorter."""

    rows: int
    sums: Values

    def wrong(self, values: Values, first: int) -> int | None:
        """The first row of the first block that does not match its checksum; None if all match.

        Args:
            values: rows of the array, from the beginning of a block.
            first: the number of that block.
        """
        for block, start in enumerate(range(0, len(values), self.rows), first):
            data = np.ascontiguousarray(values[start : start + self.rows]).data.cast("B")
            if zlib.crc32(data) != self.sums[block]:
                return block * self.rows
        return None


class StoredArray:
    """An array in a file, which can be read by slices of rows. It can be pickled: another process opens the file anew.

    Args:
        path: the file.
        key: the name of the array in it.
        order: the axes of the array in the order in which to return them, None for a new axis; None: unchanged.
        blocks: the checksums; None: it has none.
    """

    def __init__(
        self, path: Path, key: str, order: Sequence[int | None] | None = None, blocks: Blocks | None = None
    ) -> None:
        self.path = path
        self.key = key
        self.order = order
        self.blocks = blocks
        self._dataset: h5py.Dataset | None = None
        dataset = self._open()
        axes = range(dataset.ndim) if order is None else order
        self.shape: tuple[int, ...] = tuple(1 if axis is None else int(dataset.shape[axis]) for axis in axes)
        self.dtype: np.dtype[Any] = dataset.dtype

    def _open(self) -> h5py.Dataset:
        if self._dataset is None or not self._dataset:
            self._dataset = h5py.File(self.path, "r", locking=False)[self.key]
        return self._dataset

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Values:
        try:
            values = self._open()[rows] if self.blocks is None else self._checked(rows, self.blocks)
        except (OSError, RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{self.path} cannot be read at {self.key} ({reason}): it is damaged; replace or delete it"
            ) from error
        if self.order is None:
            return values
        values = values.transpose([axis for axis in self.order if axis is not None])
        return values.reshape(len(values), *self.shape[1:])

    def _checked(self, rows: slice, blocks: Blocks) -> Values:
        start, stop, _ = rows.indices(len(self))
        first = start // blocks.rows
        begin = first * blocks.rows
        values: Values = self._open()[begin : math.ceil(stop / blocks.rows) * blocks.rows]
        wrong = blocks.wrong(values, first)
        if wrong is not None:
            raise UserError(_damaged(self.path, f"the checksum of {self.key} does not match at row {wrong}"))
        return values[start - begin : stop - begin]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}


class Store:
    """A converted image set, open for reading.

    Raises:
        UserError: the file is damaged, or no store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as file:
            self.attributes: dict[str, Any] = dict(file.attrs)
            self.splits = [split for split in SPLITS if split in file]
            self.labels = {split: file[split]["labels"][:].astype(np.int64) for split in self.splits}
            blocks = {
                split: Blocks(int(file[split]["crc32"].attrs["rows"]), file[split]["crc32"][:])
                for split in self.splits
            }
        self.images = {
            split: StoredArray(path, f"{split}/images", blocks=blocks[split]) for split in self.splits
        }
        self.class_names: list[str] = json.loads(self.attributes["classes"])
        self.mean = [float(value) for value in self.attributes["mean"]]
        self.std = [float(value) for value in self.attributes["std"]]


class Writer:
    """Fills a new store: first `create` the splits, then `write` the rows in any order, at last `finish`."""

    def __init__(self, file: h5py.File, raw: io.RawIOBase, progress: Progress, task: TaskID) -> None:
        self.file = file
        self.raw = raw  # the same file without h5py, which takes 0.2 ms to write one picture
        self.progress, self.task = progress, task
        self.images: dict[str, h5py.Dataset] = {}
        self.rows: dict[
            str, tuple[int, int]
        ] = {}  # for each split, the offset of its first row in the file and the bytes of a row
        self.needed = ROOM
        reserve(raw, self.needed)

    def create(self, split: str, labels: Values, shape: Sequence[int]) -> None:
        """Writes the labels [N] of a split and makes room for N images of `shape` [C, H, W]."""
        size = (len(labels), *shape)
        self.needed += math.prod(size) + 8 * len(labels) + 4 * (len(labels) + 1)
        reserve(self.raw, self.needed)
        early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # so that the offset in the file is known
        group = self.file.create_group(split)
        group.create_dataset("labels", data=labels, dtype=np.int64)
        images = group.create_dataset("images", size, np.uint8, fill_time="never", dcpl=early)
        self.images[split], self.rows[split] = images, (images.id.get_offset(), math.prod(shape))
        known = self.progress.tasks[self.task].total or 0
        self.progress.update(self.task, total=known + len(labels), visible=True)

    def write(self, split: str, row: int, images: Values) -> None:
        """Writes images [n, C, H, W] to the rows row, row + 1, ..."""
        first, size = self.rows[split]
        data = np.ascontiguousarray(images).data.cast("B")
        self.raw.seek(first + row * size)
        if self.raw.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.progress.advance(self.task, len(images))

    def finish(self, classes: Sequence[str], **attributes: str) -> None:
        """Adds statistics, checksums and attributes."""
        sums = ""
        for split, images in self.images.items():
            sums += self._add_checksums(self.file[split], images)
        mean, std = statistics(self.file["train"]["images"])
        checksum = hashlib.sha256(sums.encode()).hexdigest()
        self.file.attrs.update(
            version=VERSION, layout="NCHW", checksum=checksum, classes=json.dumps(list(classes)), **attributes
        )
        self.file.attrs.update(mean=mean, std=std, format=FORMAT)

    def _add_checksums(self, group: h5py.Group, images: h5py.Dataset) -> str:
        """Adds the checksums of the blocks and of the whole group; returns the latter."""
        rows = max(1, BLOCK_BYTES // max(1, math.prod(images.shape[1:])))
        digest, sums = hashlib.sha256(), []
        for slab in slabs((math.ceil(len(images) / rows), rows, *images.shape[1:]), 1):
            values = images[slab.start * rows : slab.stop * rows]
            digest.update(values.data)
            sums += [
                zlib.crc32(values[start : start + rows].data.cast("B"))
                for start in range(0, len(values), rows)
            ]
        group.create_dataset("crc32", data=np.array(sums, np.uint32)).attrs["rows"] = rows
        digest.update(np.ascontiguousarray(group["labels"][:], dtype="<i8").data)
        group.attrs["checksum"] = digest.hexdigest()
        return digest.hexdigest()

    def places(self) -> list[tuple[int, int]]:
        """Where in the file the images of each split are: (offset, bytes)."""
        return [(images.id.get_offset(), math.prod(images.shape)) for images in self.images.values()]


def reserve(file: io.RawIOBase, size: int) -> None:
    """Makes sure that the disk has room for `size` bytes of a file, because HDF5 crashes on a full disk.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    elif size > shutil.disk_usage(os.path.dirname(str(file.name))).free:  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def new_file(path: Path) -> h5py.File:
    """An empty store, with room for its seal."""
    with open(path, "xb", buffering=0) as file:  # without HDF5 first, because it would crash on a full disk
        reserve(file, ROOM)
    path.unlink()
    return h5py.File(path, "x", userblock_size=SEAL_BYTES)


def close_off(path: Path, places: Sequence[tuple[int, int]]) -> None:
    """Writes the seal of a complete store."""
    seal(path, places, format=FORMAT, version=VERSION)


def is_store(path: Path) -> bool:
    """Whether a file is a store of this version, damaged or not."""
    with open(path, "rb") as file:
        return FORMAT.encode() in file.read(SEAL_BYTES)


def is_outdated(path: Path) -> bool:
    """Whether a file is a store of version 1, which had no seal and is made anew."""
    try:
        if is_store(path) or not has_signature(path):
            return False
        with h5py.File(path, "r", locking=False) as file:
            return bool(file.attrs.get("format") == FORMAT and file.attrs.get("version") == 1)
    except (OSError, RuntimeError, KeyError):
        return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        check_seal(path, format=FORMAT, version=VERSION)
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except Damaged as error:
        raise UserError(_damaged(path, str(error))) from error
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(_damaged(path, str(error).splitlines()[0])) from error


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is truncated, damaged or foreign ({reason}): delete it and the next run makes it anew"
