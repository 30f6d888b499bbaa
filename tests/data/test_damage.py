"""200 truncations and flipped bits in stores and users' files: each is told, or makes no difference."""

import shutil

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from sglight.data.arrays import HDF5Data
from sglight.data.folder import ImageFolderData
from sglight.errors import UserError

TIMES = 40


@pytest.fixture
def textured(tmp_path):
    """Pictures that differ in each pixel."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in ("cat", "dog"):
            folder = tmp_path / "pictures" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(generator.integers(0, 256, (9, 9, 3), np.uint8)).save(
                    folder / f"{number}.png"
                )
    return tmp_path / "pictures"


def served(data):
    """All that a data module gives, and what it says about it."""
    data.prepare_data()
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    return [torch.cat(part) for loader in loaders for part in zip(*loader, strict=True)], data.notes


def damaged(whole, generator):
    data = bytearray(whole)
    if generator.integers(4) == 0:
        return data[: generator.integers(len(data))]
    data[generator.integers(len(data))] ^= 1 << generator.integers(8)
    return data


def survives(path, make):
    """Whether damage to the file at `path` is told by what `make` makes, or makes no difference."""
    generator = np.random.default_rng(0)
    whole = path.read_bytes()
    expected, notes = served(make())
    told, one_line = 0, True
    for _ in range(TIMES):
        path.write_bytes(damaged(whole, generator))
        try:
            found, now = served(make())
        except UserError as error:
            one_line &= "\n" not in str(error)
            told += 1
            continue
        same = all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert same or now != notes
        told += now != notes
    assert one_line
    return told


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_archives(textured, tmp_path, kind):
    path = textured.with_name("x.zip" if kind == "zip" else "x.tar.gz")
    shutil.make_archive(str(textured.with_name("x")), kind, textured)
    keys = {"archive": str(path), "validation_fraction": 0.25}
    assert survives(path, lambda: ImageFolderData(fresh(tmp_path), **keys)) > TIMES / 2


@pytest.mark.slow
def test_picture_files(textured, tmp_path):
    keys = {"raw_dir": str(textured), "validation_fraction": 0.25}
    path = textured / "train" / "cat" / "3.png"
    assert survives(path, lambda: ImageFolderData(fresh(tmp_path), **keys)) > 0.9 * TIMES


@pytest.mark.slow
def test_stores(textured, tmp_path):
    keys = {"raw_dir": str(textured), "validation_fraction": 0.25}
    make = lambda: ImageFolderData(str(tmp_path / "data"), **keys)  # noqa: E731
    make().prepare_data()
    assert survives(make().store_path, make) > TIMES / 2


@pytest.mark.slow
def test_arrays(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = generator.normal(size=(60, 5)), np.arange(60) % 3
    folder = tmp_path / "data"
    HDF5Data(path=str(path), data_dir=str(folder)).prepare_data()
    known = {file.name: file.read_bytes() for file in folder.iterdir()}

    def make():
        for name, text in known.items():
            (folder / name).write_bytes(text)
        return HDF5Data(path=str(path), data_dir=str(folder))

    assert survives(path, make) == TIMES


def fresh(tmp_path):
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    return str(tmp_path / "data")
