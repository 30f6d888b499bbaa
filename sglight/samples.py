"""Reads the input of `mode=predict` in batches: pictures, HDF5 or npy files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sglight.data.pixels import Decoder
from sglight.errors import UserError

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
HDF5 = {".h5", ".hdf5"}
# Names of the array in an HDF5 file; the first that exists is used.
ARRAYS = ("x", "x_test", "test/images")
Batch = tuple[list[str], np.ndarray[Any, Any]]


class Samples:
    """The samples in a file or folder; ``len()`` is their number.

    Args:
        source: a picture, a folder of pictures, or an HDF5 or npy file.
        shape: of the samples that the network takes.

    Raises:
        UserError: for files that cannot be read, or samples of another shape.
    """

    def __init__(self, source: Path, shape: tuple[int, ...]) -> None:
        self.source, self.shape = source, shape
        self.array: Any = None
        self.files: list[Path] = []
        if source.is_dir():
            self.files = [p for p in _below(source) if p.suffix.lower() in PICTURES]
            if not self.files:
                raise self._error(f"has no pictures ({', '.join(sorted(PICTURES))})")
        elif source.suffix.lower() in PICTURES:
            self.files = [source]
        elif source.suffix.lower() in HDF5 or source.suffix.lower() == ".npy":
            self.array = self._open()
        else:
            raise self._error("is no picture, .npy, .h5 or .hdf5 file, and no folder of pictures")
        if self.files and (len(shape) != 3 or shape[0] not in (1, 3)):
            raise self._error(f"holds pictures, but the network takes samples of shape {list(shape)}")

    def __len__(self) -> int:
        return len(self.files) if self.array is None else len(self.array)

    def batches(self, size: int) -> Iterator[Batch]:
        """All samples in order, ``size`` at a time: their names and an array ``[B, *shape]``."""
        if self.array is None:
            for start in range(0, len(self.files), size):
                files = self.files[start : start + size]
                names = [f.name if f == self.source else str(f.relative_to(self.source)) for f in files]
                yield names, np.stack([self._picture(file) for file in files])
            return
        for start in range(0, len(self.array), size):
            rows = np.asarray(self.array[start : start + size])
            yield [str(start + i) for i in range(len(rows))], self._arranged(rows)

    def _picture(self, file: Path) -> np.ndarray[Any, Any]:
        channels, height, width = self.shape
        decoder = Decoder("RGB" if channels == 3 else "L", None)  # the one that reads training pictures
        try:
            pixels = decoder(file.read_bytes())
        except UserError as error:
            raise UserError(f"predict.input: {file} {error}") from error
        if pixels.shape[1:] != (height, width):
            raise UserError(
                f"predict.input: {file} has {pixels.shape[2]} x {pixels.shape[1]} pixels (width x height), the network "
                f"takes {width} x {height}; scale it first"
            )
        return pixels

    def _open(self) -> Any:
        try:
            if self.source.suffix.lower() == ".npy":
                array: Any = np.load(self.source, mmap_mode="r", allow_pickle=False)
            else:
                file = h5py.File(self.source, "r", locking=False)
                array = next((file[k] for k in ARRAYS if isinstance(file.get(k), h5py.Dataset)), None)
                if array is None:
                    raise self._error(
                        f"has no array {' or '.join(ARRAYS)}, but {', '.join(file) or 'nothing'}"
                    )
        except (OSError, ValueError, EOFError) as error:
            raise self._error(f"cannot be read ({str(error).splitlines()[0]})") from error
        if array.dtype.kind not in "biuf":
            raise self._error(f"holds {array.dtype}, not real numbers")
        self._arranged(np.empty((0, *array.shape[1:])), array.shape)
        return array

    def _arranged(self, x: np.ndarray[Any, Any], whole: tuple[int, ...] = ()) -> np.ndarray[Any, Any]:
        """``x`` with the channels first, if they are last or left out."""
        if x.shape[1:] == self.shape:
            return x
        if len(self.shape) == 3:
            channels, *size = self.shape
            if x.shape[1:] == (*size, channels):
                return np.moveaxis(x, -1, 1)
            if channels == 1 and x.shape[1:] == tuple(size):
                return x[:, None]
        raise self._error(f"holds an array {list(whole or x.shape)}, the network takes [N, {self._sizes}]")

    @property
    def _sizes(self) -> str:
        return ", ".join(map(str, self.shape))

    def _error(self, reason: str) -> UserError:
        return UserError(f"predict.input={self.source} {reason}")


def _below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))
