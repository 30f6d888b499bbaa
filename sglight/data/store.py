"""The HDF5 file that an image set is converted to, once.

    /                attributes: format, version, name, source, fingerprint, checksum, layout, classes,
                     mean, std
    /train/images    uint8 [N, C, H, W] (layout "NCHW"), stored contiguously
    /train/labels    int64 [N]
    /test/images, /test/labels

`mean` and `std` are per channel, of the training images as numbers in [0, 1]. A group's attribute `checksum` is
the SHA-256 of its images and labels. The file is written under another name and moved into place when it is
complete.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from sglight.data.statistics import slabs, statistics
from sglight.errors import UserError

FORMAT = "sglight-images"
VERSION = 1
SPLITS = ("train", "test")
Values = np.ndarray[Any, Any]


class StoredArray:
    """The rows of one array of a file, read as [n, ...]; opens the file late and again in another process."""

    def __init__(self, path: Path, key: str, order: Sequence[int | None] | None = None) -> None:
        self.path = path
        self.key = key
        self.order = order  # the file's axes in our order, None for a new one; None: as they are
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
            values = self._open()[rows]
        except OSError as error:
            raise UserError(f"{self.path} cannot be read at {self.key} ({error}): it is damaged") from error
        if self.order is None:
            return values
        values = values.transpose([axis for axis in self.order if axis is not None])
        return values.reshape(len(values), *self.shape[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_dataset": None}


class Store:
    """A converted image set, open for reading.

    Raises:
        UserError: the file is damaged, or is none of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as file:
            self.attributes: dict[str, Any] = dict(file.attrs)
            self.sums = {split: str(file[split].attrs["checksum"]) for split in SPLITS}
            self.labels = {split: file[split]["labels"][:].astype(np.int64) for split in SPLITS}
        self.images = {split: StoredArray(path, f"{split}/images") for split in SPLITS}
        self._verified: set[str] = set()
        self.class_names: list[str] = json.loads(self.attributes["classes"])
        self.mean = [float(value) for value in self.attributes["mean"]]
        self.std = [float(value) for value in self.attributes["std"]]

    def verify(self, split: str) -> None:
        """Compares the checksum of the images behind "train", "val" or "test" with them, once.

        Raises:
            UserError: they differ.
        """
        name = "test" if split == "test" else "train"
        if name in self._verified:
            return
        if _checksum(self.images[name], self.labels[name]) != self.sums[name]:
            raise UserError(_damaged(self.path, f"the checksum of its {name} images does not match"))
        self._verified.add(name)


class Writer:
    """Fills a new store: first `create` the splits, then `write` the rows, in any order."""

    def __init__(self, file: h5py.File, raw: io.RawIOBase, progress: Progress, task: TaskID) -> None:
        self.file = file
        self.raw = raw  # the same file: h5py takes 0.2 ms to write one picture
        self.progress, self.task = progress, task
        self.images: dict[str, h5py.Dataset] = {}

    def create(self, split: str, labels: Values, shape: Sequence[int]) -> None:
        """Writes the labels [N] and makes room for as many images of `shape` [C, H, W]."""
        early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # so that the place in the file is known
        group = self.file.create_group(split)
        group.create_dataset("labels", data=labels, dtype=np.int64)
        size = (len(labels), *shape)
        self.images[split] = group.create_dataset("images", size, np.uint8, fill_time="never", dcpl=early)
        known = self.progress.tasks[self.task].total or 0
        self.progress.update(self.task, total=known + len(labels), visible=True)

    def write(self, split: str, row: int, images: Values) -> None:
        """Puts images [n, C, H, W] at row, row + 1, ..."""
        target = self.images[split]
        data = np.ascontiguousarray(images).data.cast("B")
        self.raw.seek(target.id.get_offset() + row * math.prod(target.shape[1:]))
        if self.raw.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.progress.advance(self.task, len(images))

    def finish(self, classes: Sequence[str], **attributes: str) -> None:
        """Adds statistics, checksums and attributes."""
        for split, images in self.images.items():
            self.file[split].attrs["checksum"] = _checksum(images, self.file[split]["labels"][:])
        sums = "".join(self.file[split].attrs["checksum"] for split in SPLITS)
        mean, std = statistics(self.file["train"]["images"])
        checksum = hashlib.sha256(sums.encode()).hexdigest()
        self.file.attrs.update(
            version=VERSION, layout="NCHW", checksum=checksum, classes=json.dumps(list(classes)), **attributes
        )
        self.file.attrs.update(mean=mean, std=std, format=FORMAT)


def ensure(path: Path, fingerprint: str, fill: Callable[[Writer], None]) -> None:
    """Makes the store at `path` unless it is there already, made from the same source.

    Two processes that need the same store at once do not meet: the second waits, and finds it made.

    Args:
        path: where it belongs.
        fingerprint: tells one state of the source from another.
        fill: writes them.

    Raises:
        UserError: the folder cannot be written to, or a damaged file is in the way.
    """
    if _made(path, fingerprint):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as alone:
            if _made(path, fingerprint):
                return
            if alone:
                _sweep(path)
            _write(path, fingerprint, fill)
    except OSError as error:
        raise UserError(f"data_dir={path.parent}: {path.name} cannot be made there ({error})") from error


def _made(path: Path, fingerprint: str) -> bool:
    return path.exists() and Store(path).attributes["fingerprint"] == fingerprint


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    try:
        if not h5py.is_hdf5(path):
            raise UserError(_damaged(path, "it is not an HDF5 file"))
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != FORMAT:
                raise UserError(_damaged(path, "it holds no image set of ours"))
            if file.attrs.get("version") != VERSION:
                raise UserError(_damaged(path, f"its version is not {VERSION}"))
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise UserError(_damaged(path, str(error).splitlines()[0])) from error


def _damaged(path: Path, reason: str) -> str:
    return f"{path} is truncated, damaged or foreign ({reason}): delete it and the next run makes it anew"


def _checksum(images: Any, labels: Values) -> str:
    digest = hashlib.sha256()
    for rows in slabs(images.shape, 1):
        digest.update(np.ascontiguousarray(images[rows]).data)
    digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Waits for other processes that make this file; yields whether the system promises that there is none."""
    try:
        import fcntl
    except ImportError:  # not on this system: the temporary names are unique, so two writers still do no harm
        yield False
        return
    while True:
        with open(path.with_name(f".{path.name}.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:  # a file system without locks
                yield False
                return
            if not _is_at(lock.name, lock.fileno()):
                continue  # the process that we waited for has removed its lock: this one would bar nobody
            try:
                yield True
            finally:
                os.unlink(lock.name)
            return


def _is_at(name: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(name), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sweep(path: Path) -> None:
    """Removes what killed processes left half-written."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _write(path: Path, fingerprint: str, fill: Callable[[Writer], None]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with (
            Progress(*columns, console=Console(stderr=True)) as progress,
            h5py.File(temporary, "x") as file,
            open(temporary, "r+b", buffering=0) as raw,
        ):
            task = progress.add_task(f"making {path.name}", total=None, visible=False)
            file.attrs["fingerprint"] = fingerprint
            fill(Writer(file, raw, progress, task))
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
