"""The user's own arrays in an HDF5 file."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sglight.data.images import SampleData
from sglight.data.module import Contents, Part, stratified
from sglight.data.statistics import statistics
from sglight.data.store import StoredArray
from sglight.errors import UserError

FOUR = ("x_train", "y_train", "x_test", "y_test")
TWO = ("x", "y")
OURS = ("train/images", "train/labels", "test/images", "test/labels")  # a store, see store.py
LAYOUTS = ("auto", "channels_first", "channels_last")
COLOURS = (1, 3, 4)  # numbers of channels that `auto` knows


class HDF5Data(SampleData):
    """Pictures or feature vectors with labels, read from the user's file as they are.

    Args:
        name: names the run's folder.
        path: the file, with x_train, y_train, x_test, y_test or with x, y; x [N, C, H, W], [N, H, W, C],
            [N, H, W] or [N, F] of any number type (bytes are pixels), y the classes 0, 1, ... [N]. The file's
            attribute `classes`, a list of strings, names them.
        layout: `channels_first`, `channels_last` or `auto`.
        test_fraction: share held out for the test where the file has only x and y.
        keys: those of `SampleData`.
    """

    def __init__(
        self,
        name: str = "hdf5",
        path: str | None = None,
        layout: str = "auto",
        test_fraction: float = 0.2,
        **keys: Any,
    ) -> None:
        super().__init__(name, **keys)
        if path is None:
            raise UserError("dataset=hdf5 needs dataset.path, the HDF5 file with your arrays")
        if layout not in LAYOUTS:
            raise UserError(f"dataset.layout={layout} is unknown: choose one of {', '.join(LAYOUTS)}")
        self.path = Path(path).expanduser().resolve()
        self.layout = layout
        self.test_fraction = test_fraction

    def prepare_data(self) -> None:
        """Checks the file."""
        self._survey()

    def open(self) -> Contents:
        """The file's arrays, split."""
        keys, names = self._survey()
        x, y = self._array(keys[0]), self._classes(keys[1], keys[0])
        if len(keys) == 2:
            rest, test = stratified(y, self.test_fraction, self.data_seed, "dataset.test_fraction")
            parts = {**self.split(x, rest, y), "test": Part(x, test, y[test])}
        else:
            rest = np.arange(len(y))
            x_test, y_test = self._array(keys[2]), self._classes(keys[3], keys[2])
            if x_test.shape[1:] != x.shape[1:]:
                raise self._error(
                    f"{keys[2]} has samples of shape {x_test.shape[1:]}, {keys[0]} of {x.shape[1:]}"
                )
            parts = {**self.split(x, rest, y), "test": Part(x_test, np.arange(len(y_test)), y_test)}
        mean, std = statistics(x, rest)
        if not np.isfinite(mean + std).all():
            raise self._error(f"{keys[0]} holds numbers that are not finite")
        return Contents(parts, self._class_names(parts, names), mean, std)

    def _error(self, reason: str) -> UserError:
        return UserError(f"dataset.path={self.path}: {reason}")

    def _survey(self) -> tuple[tuple[str, ...], list[str]]:
        """Which arrays there are, and the classes' names if the file tells them."""
        if not self.path.is_file():
            raise self._error("there is no such file")
        if not h5py.is_hdf5(self.path):
            raise self._error("it is not an HDF5 file")
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                names = file.attrs.get("classes", [])
                for keys in (FOUR, TWO, OURS):
                    if all(isinstance(file.get(key), h5py.Dataset) for key in keys):
                        return keys, [
                            str(name) for name in (json.loads(names) if isinstance(names, str) else names)
                        ]
                missing = [key for key in FOUR if key not in file]
                present = ", ".join(file) or "nothing"
        except (OSError, RuntimeError) as error:
            raise self._error(f"it is truncated or damaged ({str(error).splitlines()[0]})") from error
        raise self._error(
            f"{', '.join(missing)} missing: it needs {', '.join(FOUR)}, or x and y, and has {present}"
        )

    def _array(self, key: str) -> StoredArray:
        x = StoredArray(self.path, key)
        if not (np.issubdtype(x.dtype, np.number) or x.dtype == np.bool_) or x.dtype.kind == "c":
            raise self._error(f"{key} holds {x.dtype}, not real numbers")
        if len(x.shape) not in (2, 3, 4) or 0 in x.shape:
            raise self._error(
                f"{key} has shape {x.shape}: it must be [N, C, H, W], [N, H, W, C], [N, H, W] or [N, F]"
            )
        if len(x.shape) == 2:
            return x
        return StoredArray(self.path, key, (0, None, 1, 2) if len(x.shape) == 3 else self._axes(key, x.shape))

    def _axes(self, key: str, shape: tuple[int, ...]) -> tuple[int | None, ...] | None:
        first, last = shape[1] in COLOURS, shape[3] in COLOURS
        if self.layout == "auto" and first == last:
            raise self._error(
                f"where {key} of shape {shape} has its channels cannot be told: set dataset.layout"
            )
        return (0, 3, 1, 2) if self.layout == "channels_last" or (self.layout == "auto" and last) else None

    def _classes(self, key: str, x_key: str) -> np.ndarray[Any, Any]:
        with h5py.File(self.path, "r", locking=False) as file:
            y, samples = file[key][()], len(file[x_key])
        if y.shape != (samples,):
            raise self._error(
                f"{key} has shape {y.shape}: it must be [{samples}], one class number for each of {x_key}"
            )
        if y.dtype.kind not in "iuf" or not np.array_equal(y, np.floor(y)) or y.min() < 0:
            raise self._error(f"{key} must hold the class numbers 0, 1, 2, ...")
        return y.astype(np.int64)

    def _class_names(self, parts: dict[str, Part], names: list[str]) -> list[str]:
        known = np.unique(np.concatenate([parts["train"].y, parts["val"].y]))
        count = int(known[-1]) + 1
        if len(known) < count:
            absent = min(set(range(count)) - set(known.tolist()))
            raise self._error(
                f"class {absent} has no training sample: the classes must be 0, 1, ... without gaps"
            )
        if parts["test"].y.max() >= count:
            raise self._error(
                f"class {parts['test'].y.max()} is in the test samples but not in the training samples"
            )
        if names and len(names) != count:
            raise self._error(f"the attribute classes names {len(names)} classes, the labels have {count}")
        return names or [str(label) for label in range(count)]
