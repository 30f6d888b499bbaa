"""Published image sets: scikit-learn's digits, and torchvision's sets, which are converted to a store."""

import gzip
import hashlib
import math
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from sglight.compat.sklearn import digits
from sglight.config.datasets import at_least, fraction
from sglight.data.augment import Augmentation
from sglight.data.making import ensure
from sglight.data.module import Contents, DataModule, Part, stratified
from sglight.data.sources import Source
from sglight.data.statistics import statistics
from sglight.data.store import Store, Writer
from sglight.errors import UserError

Splits = dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
TIMEOUT_S = 10.0


class SampleData(DataModule):
    """A data set whose validation samples are drawn from the training set; batches may be augmented.

    Args:
        name: of the data set.
        batch_size, eval_batch_size: samples in a batch, for training and for evaluation.
        seed: of the order of the batches and of the augmentation.
        data_seed: of the draw of validation and test samples.
        validation_fraction: the part of the training samples held out for validation.
        augment: whether to augment training batches.
        crop_padding, flip: see `Augmentation`.
        memory_limit: in GiB; larger data sets are read from the file in chunks.
    """

    def __init__(
        self,
        name: str,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        seed: int = 1,
        data_seed: int = 0,
        validation_fraction: float = 0.1,
        augment: bool = False,
        crop_padding: int = 4,
        flip: bool = False,
        memory_limit: float = 4.0,
    ) -> None:
        at_least("dataset.crop_padding", crop_padding, 0)
        augmentation = Augmentation(crop_padding, flip) if augment and (crop_padding or flip) else None
        super().__init__(name, batch_size, eval_batch_size, seed, data_seed, augmentation, memory_limit)
        fraction("dataset.validation_fraction", validation_fraction)
        self.validation_fraction = validation_fraction
        if flip and not augment:
            self.notes.append("dataset.flip=true has no effect without dataset.augment=true")

    def split(self, x: Any, rows: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> dict[str, Part]:
        """The parts "train" and "val" of the training samples x[rows], y[rows]."""
        key = "dataset.validation_fraction"
        train, val = stratified(y[rows], self.validation_fraction, self.data_seed, key)
        return {"train": Part(x, rows[train], y[rows[train]]), "val": Part(x, rows[val], y[rows[val]])}


class StoreData(SampleData):
    """An image set that is converted once to an HDF5 file (the store); subclasses define the source.

    Test and validation images that the source lacks are held out of the training images.

    Args:
        name: of the data set, as part of the name of the run folder.
        data_dir: the folder of the store.
        test_fraction: the part of the training images held out for the test if there are no test images.
        keys: those of `SampleData`.
    """

    def __init__(self, name: str, data_dir: str, test_fraction: float = 0.2, **keys: Any) -> None:
        super().__init__(name, **keys)
        fraction("dataset.test_fraction", test_fraction)
        self.test_fraction = test_fraction
        self.data_dir = Path(data_dir).expanduser().resolve()

    @property
    def store_path(self) -> Path:
        """The path of the store."""
        raise NotImplementedError

    def open(self) -> Contents:
        """The contents of the store, as training, validation and test samples."""
        if not self.store_path.exists():
            self.prepare_data()
        store = Store(self.store_path)
        if "summary" in store.attributes:
            self.notes.append(str(store.attributes["summary"]))
        y, mean, std = store.labels["train"], store.mean, store.std
        rest = np.arange(len(y))
        parts = {
            split: Part(store.images[split], np.arange(len(store.labels[split])), store.labels[split])
            for split in store.splits
            if split != "train"
        }
        if "test" not in parts:
            rest, test = stratified(y, self.test_fraction, self.data_seed, "dataset.test_fraction")
            parts["test"] = Part(store.images["train"], test, y[test])
            mean, std = statistics(store.images["train"], rest)
        train = Part(store.images["train"], rest, y[rest])
        parts |= {"train": train} if "val" in parts else self.split(store.images["train"], rest, y)
        return Contents(parts, store.class_names, mean, std)


class DigitsData(SampleData):
    """scikit-learn's handwritten digits, 1,797 pictures [1, 8, 8] of 10 classes."""

    def __init__(self, name: str = "digits", test_fraction: float = 0.2, **keys: Any) -> None:
        super().__init__(name, **keys)
        fraction("dataset.test_fraction", test_fraction)
        self.test_fraction = test_fraction

    def open(self) -> Contents:
        """The pictures, as training, validation and test samples."""
        images, y = digits()
        x = images[:, None]  # levels 0 ... 16
        rest, test = stratified(y, self.test_fraction, self.data_seed, "dataset.test_fraction")
        parts = {**self.split(x, rest, y), "test": Part(x, test, y[test])}
        mean, std = statistics(x, rest)
        return Contents(parts, [str(label) for label in range(10)], mean, std)


# name: (torchvision's class, the folder below its root in which it looks for the files)
SETS = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
}
IDX_FILES = {"train": "train", "test": "t10k"}


class TorchvisionData(StoreData):
    """MNIST, Fashion-MNIST, CIFAR-10 or CIFAR-100, from files on disk or downloaded by torchvision.

    Args:
        name: `mnist`, `fashion_mnist`, `cifar10` or `cifar100`.
        data_dir: the folder of the store.
        raw_dir: torchvision's root, or the folder of the original files; it is only read.
        download: whether the files may be downloaded.
        keys: those of `SampleData`.
    """

    def __init__(
        self, name: str, data_dir: str, raw_dir: str | None = None, download: bool = True, **keys: Any
    ) -> None:
        super().__init__(name, data_dir, **keys)
        if name not in SETS:
            raise UserError(f"dataset.name={name} is not an image set: choose one of {', '.join(SETS)}")
        self.raw_dir = None if raw_dir is None else Path(raw_dir).expanduser().resolve()
        self.download = download

    @property
    def store_path(self) -> Path:
        """<data_dir>/<name>.h5 if the files are downloaded, else a name that depends on their folder."""
        if self.raw_dir is None:
            return self.data_dir / f"{self.name}.h5"
        return self.data_dir / f"{self.name}-{short_hash(str(self._raw_files()))}.h5"

    def prepare_data(self) -> None:
        """Makes the store, unless it is there."""
        source = "download" if self.raw_dir is None else str(self._raw_files())
        fingerprint = (
            source if self.raw_dir is None else Source(self._raw_files(), "dataset.raw_dir").fingerprint()
        )
        ensure(self.store_path, fingerprint, self._fill)

    def _raw_files(self) -> Path:
        assert self.raw_dir is not None
        folder = SETS[self.name][1]
        for candidate in (self.raw_dir / folder, self.raw_dir):
            if "cifar" in self.name and candidate.name != folder:
                continue  # torchvision insists on the name
            if "cifar" in self.name:
                found = (candidate / self._probe()).is_file()
            else:
                found = any(path.is_file() for path in idx_paths(candidate / self._probe()))
            if found:
                return candidate
        raise UserError(
            f"dataset.raw_dir={self.raw_dir} has no {folder}/{self._probe()}: "
            f"name the folder that holds {folder}, or that folder itself"
        )

    def _probe(self) -> str:
        return {"cifar10": "data_batch_1", "cifar100": "train"}.get(self.name, "train-images-idx3-ubyte")

    def _fill(self, writer: Writer) -> None:
        if self.raw_dir is not None:
            self._write(writer, self._raw_files(), str(self._raw_files()))
            return
        if not self.download:
            raise UserError(self._missing("dataset.download=false forbids to download them"))
        with tempfile.TemporaryDirectory(".tmp", f".{self.store_path.name}.", self.data_dir) as root:
            with self._network():
                getattr(_torchvision(), SETS[self.name][0])(root, download=True)
            self._write(writer, Path(root) / SETS[self.name][1], f"torchvision {SETS[self.name][0]}")

    def _missing(self, reason: str) -> str:
        return (
            f"the files of dataset={self.name} are not here and {reason}: "
            f"set dataset.raw_dir to a folder that holds {SETS[self.name][1]}"
        )

    @contextmanager
    def _network(self) -> Iterator[None]:
        previous = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT_S)
        try:
            yield
        except (OSError, RuntimeError, HTTPException) as error:  # URLError and timeouts are OSErrors
            if getattr(error, "errno", None) is not None and not isinstance(
                error, ConnectionError | TimeoutError
            ):
                raise  # an error of the disk, not of the network
            raise UserError(self._missing("could not be downloaded")) from error
        finally:
            socket.setdefaulttimeout(previous)

    def _write(self, writer: Writer, files: Path, source: str) -> None:
        splits, classes = (self._idx if "mnist" in self.name else self._cifar)(files)
        for split, (images, labels) in splits.items():
            writer.create(split, labels, images.shape[1:])
        for split, (images, _) in splits.items():
            for row in range(0, len(images), 1000):
                writer.write(split, row, images[row : row + 1000])
        writer.finish(classes, name=self.name, source=source)

    def _idx(self, files: Path) -> tuple[Splits, list[str]]:
        splits = {}
        for split, prefix in IDX_FILES.items():
            images = read_idx(files / f"{prefix}-images-idx3-ubyte", 3)
            labels = read_idx(files / f"{prefix}-labels-idx1-ubyte", 1)
            if len(images) != len(labels):
                raise UserError(
                    f"{files} has {len(images)} {split} images but {len(labels)} labels: fetch it anew"
                )
            splits[split] = (images[:, None], labels)
        names = [str(name) for name in getattr(_torchvision(), SETS[self.name][0]).classes]
        return splits, [name.split(" - ")[0] for name in names]

    def _cifar(self, files: Path) -> tuple[Splits, list[str]]:
        try:
            sets = {
                split: getattr(_torchvision(), SETS[self.name][0])(files.parent, train=split == "train")
                for split in IDX_FILES
            }
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{files} is incomplete or damaged: fetch it anew, see dataset.raw_dir"
            ) from error
        splits = {
            split: (data.data.transpose(0, 3, 1, 2), np.array(data.targets)) for split, data in sets.items()
        }
        return splits, list(sets["train"].classes)


def _torchvision() -> Any:
    from torchvision import datasets  # takes a second to import

    return datasets


def idx_paths(path: Path) -> list[Path]:
    """The names under which an IDX file may be found: the original one, Kaggle's, and both with .gz."""
    kaggle = path.with_name(path.name.replace("-idx", ".idx"))
    plain = [path, kaggle, path / path.name, kaggle / kaggle.name]
    return plain + [name.with_name(f"{name.name}.gz") for name in plain]


def read_idx(path: Path, dimensions: int) -> np.ndarray[Any, Any]:
    """The contents of an IDX file of bytes, under any of its names (`idx_paths`), as an array.

    Raises:
        UserError: the file is missing, truncated or of another format.
    """
    try:
        given = next((other for other in idx_paths(path) if other.is_file()), path)
        data = given.read_bytes()
        if given.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is missing or cannot be read ({error}): see dataset.raw_dir") from error
    head = 4 + 4 * dimensions
    shape = struct.unpack(f">{dimensions}i", data[4:head].ljust(head - 4, b"\0"))
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) != head + math.prod(shape):
        raise UserError(f"{path} is truncated or no IDX file of bytes: fetch it anew, see dataset.raw_dir")
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def short_hash(text: str) -> str:
    """Ten hexadecimal digits that identify ``text``."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]
