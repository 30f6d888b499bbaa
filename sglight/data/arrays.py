"""The data set `hdf5`: the user's own arrays in an HDF5 file."""

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sglight.config.datasets import fraction
from sglight.data.images import SampleData, short_hash
from sglight.data.module import Contents, Part, stratified
from sglight.data.probe import Unreadable, in_one_file, load_filters, missing_filters, probe
from sglight.data.record import Record
from sglight.data.seal import has_signature
from sglight.data.standardised import Standardised
from sglight.data.statistics import statistics
from sglight.data.store import Store, StoredArray, is_store
from sglight.errors import UserError

PAIRS = {"train": ("x_train", "y_train"), "val": ("x_val", "y_val"), "test": ("x_test", "y_test")}
ALONE = ("x", "y")
NEEDED = "it needs x_train, y_train, x_test, y_test, or x and y"
LAYOUTS = ("auto", "channels_first", "channels_last")
COLOURS = (1, 3, 4)  # numbers of channels by which `auto` recognises the channel axis
LARGEST = 2**53  # whole numbers up to here are exact as floats
Values = np.ndarray[Any, Any]


class HDF5Data(SampleData):
    """Pictures or feature vectors with labels from the user's HDF5 file.

    The file has the arrays x_train, y_train, x_test, y_test and perhaps x_val, y_val, or only x and y. An x has shape
    [N, C, H, W], [N, H, W, C], [N, H, W] or [N, F] and any number type; bytes are taken as pixels. A y holds the class
    numbers 0, 1, ... [N]. The attribute `classes` of the file, a list of strings, may name the classes.

    Args:
        name: of the data set, as part of the name of the run folder.
        path: the file.
        layout: where pictures have their channels: `channels_first`, `channels_last` or `auto`.
        test_fraction: the part of the samples held out for the test if the file has no test samples.
        data_dir: folder in which the checksum of the file is kept; None: changes of the file are not noticed.
        keys: those of `SampleData`.
    """

    def __init__(
        self,
        name: str = "hdf5",
        path: str | None = None,
        layout: str = "auto",
        test_fraction: float = 0.2,
        data_dir: str | None = None,
        **keys: Any,
    ) -> None:
        super().__init__(name, **keys)
        if path is None:
            raise UserError("dataset=hdf5 needs dataset.path, the HDF5 file with your arrays")
        if layout not in LAYOUTS:
            raise UserError(f"dataset.layout={layout} is unknown: choose one of {', '.join(LAYOUTS)}")
        fraction("dataset.test_fraction", test_fraction)
        self.path = Path(path).expanduser().resolve()
        self.layout = layout
        self.test_fraction = test_fraction
        self.data_dir = None if data_dir is None else Path(data_dir).expanduser().resolve()
        self.origin = f"dataset.path={self.path}"

    def prepare_data(self) -> None:
        """Checks the file: all of its numbers if it is new or has changed, else its structure."""
        if not self.path.is_file():
            raise self._error("there is no such file")
        try:
            if not has_signature(self.path):
                raise self._error("it is not an HDF5 file")
            if self.inputs and not is_store(self.path):  # a store has checksums of its own
                self._compare()
        except OSError as error:
            raise self._error(f"it cannot be read ({error}): see its permissions and its disk") from error
        self._survey()

    def open(self) -> Contents:
        """The arrays of the file, as training, validation and test samples."""
        if is_store(self.path):
            return self._of_store(Store(self.path))
        pairs, names = self._survey()
        y = {split: self._classes(y_key, x_key) for split, (x_key, y_key) in pairs.items()}
        x = {split: self._array(x_key) for split, (x_key, _) in pairs.items()}
        for split, (x_key, _) in pairs.items():
            if x[split].shape[1:] != x["train"].shape[1:]:
                shapes = f"{x[split].shape[1:]}, {pairs['train'][0]} of {x['train'].shape[1:]}"
                raise self._error(f"{x_key} has samples of shape {shapes}: all must be of one shape")
            if (x[split].dtype == np.uint8) != (x["train"].dtype == np.uint8):
                raise self._error(
                    f"{x_key} or {pairs['train'][0]} is of bytes and the other is not: use one type"
                )
        parts = {
            split: Part(x[split], np.arange(len(y[split])), y[split]) for split in pairs if split != "train"
        }
        return self._contents_of(parts, x["train"], y["train"], names)

    def _of_store(self, store: Store) -> Contents:
        parts = {
            split: Part(store.images[split], np.arange(len(store.labels[split])), store.labels[split])
            for split in store.splits
            if split != "train"
        }
        return self._contents_of(parts, store.images["train"], store.labels["train"], store.class_names)

    def _contents_of(self, parts: dict[str, Part], x: StoredArray, y: Values, names: list[str]) -> Contents:
        """Holds out validation and test samples if the file has none; standardises numbers that are no pixels."""
        rest = np.arange(len(y))
        if "test" not in parts:
            rest, test = stratified(y, self.test_fraction, self.data_seed, "dataset.test_fraction")
            parts = {**parts, "test": Part(x, test, y[test])}
        train = Part(x, rest, y[rest])
        parts |= {"train": train} if "val" in parts else self.split(x, rest, y)
        with np.errstate(over="ignore", invalid="ignore"):
            mean, std = statistics(x, rest)
        if not np.isfinite(mean + std).all():
            raise self._error(
                "the training samples are too large or not finite: scale them, or remove NaN and inf"
            )
        names = self._class_names(parts, names)
        if x.dtype == np.uint8:
            return Contents(parts, names, mean, std)
        parts = {
            split: Part(Standardised(part.x, mean, std, self.origin), part.rows, part.y)
            for split, part in parts.items()
        }
        return Contents(parts, names, mean, std, standardised=True)

    def _error(self, reason: str) -> UserError:
        return UserError(f"dataset.path={self.path}: {reason}")

    def _compare(self) -> None:
        """Compares the checksum of the file with the one of the last run; a new or changed file is read completely.

        Raises:
            UserError: the contents have changed although nobody wrote to the file, or are damaged.
        """
        record = None if self.data_dir is None else self.data_dir / f"hdf5-{short_hash(str(self.path))}.json"
        known, now = (None, None) if record is None else (Record.load(record), Record.of(self.path))
        if known is not None and now is not None:
            if now.is_decay_of(known):
                raise self._error(
                    f"its contents are not those of {known.date}, though nobody has written to it: the disk or a copy "
                    f"is damaged; restore it, or delete {record} to take it as it is"
                )
            if now.sha256 == known.sha256:
                return
            self.notes.append(f"{self.path} has changed since {known.date}: its new contents are used")
            # Printed here, because worker processes that open the file later do not notice the change.
            print(self.notes[-1], file=sys.stderr)
        self._probe()
        if record is not None and now is not None:
            now.save(record)

    def _probe(self) -> None:
        keys = [key for pair in (*PAIRS.values(), ALONE) for key in pair]
        try:
            bad = probe(self.path, keys)
        except Unreadable as error:
            raise self._error(f"it is truncated or damaged ({error}): copy or write it anew") from error
        for key, (count, row) in bad.items():
            raise self._error(
                f"{key} holds {count} numbers that are not finite (NaN or infinite), the first in row {row}: "
                "replace them or leave these rows out"
            )

    def _survey(self) -> tuple[dict[str, tuple[str, str]], list[str]]:
        """The names of the arrays of each split, and the names of the classes if the file has them."""
        if is_store(self.path):
            return {}, Store(self.path).class_names
        load_filters()
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                pairs = self._pairs(file)
                for pair in pairs.values():
                    for key in pair:
                        self._check(file, key)
                unused = sorted(set(file) - {key for pair in pairs.values() for key in pair})
                if unused:
                    self._note(f"{self.path}: {', '.join(unused)} not used")
                return pairs, self._names(file.attrs)
        except (OSError, RuntimeError, KeyError) as error:
            raise self._error(
                f"it is truncated or damaged ({str(error).splitlines()[0]}): copy or write it anew"
            ) from error

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _pairs(self, file: h5py.File) -> dict[str, tuple[str, str]]:
        pairs = {split: pair for split, pair in PAIRS.items() if pair[0] in file or pair[1] in file}
        if "train" not in pairs and all(key in file for key in ALONE):
            pairs["train"] = ALONE
        missing = [key for pair in pairs.values() for key in pair if key not in file]
        if "train" not in pairs:
            missing += PAIRS["train"]
        if missing:
            raise self._error(
                f"{', '.join(missing)} missing: {NEEDED}, and has {', '.join(file) or 'nothing'}"
            )
        return pairs

    def _check(self, file: h5py.File, key: str) -> None:
        """Raises a UserError unless ``key`` is an array that lies in this file and can be unpacked."""
        array = file[key]
        if not isinstance(array, h5py.Dataset):
            inside = f" of {', '.join(array)}" if isinstance(array, h5py.Group) else ""
            raise self._error(
                f"{key} is a group{inside}, not an array: write the array itself, as file['{key}'] = values "
                "(from pandas: values = frame.to_numpy())"
            )
        if not in_one_file(array) or not Path(array.file.filename).samefile(self.path):
            raise self._error(
                f"{key} takes its numbers from other files (virtual, external or linked): "
                f"copy them here, as file['{key}'] = values"
            )
        if packed := missing_filters(array):
            raise self._error(
                f"{key} is packed by the HDF5 filter {packed[0]}, which is not installed: pip install hdf5plugin, or "
                f"pack it anew, as h5repack -f GZIP=4 does"
            )

    def _names(self, attributes: Any) -> list[str]:
        """The names in the attribute `classes`: a list of strings, or such a list as JSON."""
        if "classes" not in attributes:
            return []
        try:
            given = attributes["classes"]
            if isinstance(given, bytes | str):
                given = json.loads(given)
            names = [name.decode() if isinstance(name, bytes) else name for name in given]
        except (OSError, RuntimeError, TypeError, ValueError):
            names = [None]
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            raise self._error(
                "the attribute classes must be a list of strings, one for each class and no two alike, as "
                "file.attrs['classes'] = ['cat', 'dog']; mend or delete it"
            )
        return [str(name) for name in names]

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

    def _classes(self, key: str, x_key: str) -> Values:
        with h5py.File(self.path, "r", locking=False) as file:
            samples = file[x_key].shape[:1] if file[x_key].shape else (0,)
            if file[key].shape != samples or samples == (0,):
                raise self._error(
                    f"{key} has shape {file[key].shape}: it must be {list(samples)}, one class number for each of "
                    f"{x_key}"
                )
            y = StoredArray(self.path, key)[: samples[0]]
        if y.dtype.kind not in "biuf" or not np.isfinite(y).all() or not np.array_equal(y, np.floor(y)):
            raise self._error(f"{key} must hold the class numbers 0, 1, 2, ...")
        if y.min() < 0 or y.max() > LARGEST:
            raise self._error(
                f"{key} must hold the class numbers 0, 1, 2, ..., and has {y.min()} to {y.max()}"
            )
        return y.astype(np.int64)

    def _class_names(self, parts: dict[str, Part], names: list[str]) -> list[str]:
        known = np.unique(np.concatenate([parts["train"].y, parts["val"].y]))
        count = len(known)
        if known[-1] >= count:
            absent = int(np.flatnonzero(known != np.arange(count))[0])
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
