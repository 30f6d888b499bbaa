"""Small data, made here; the real files beside the checkout where there are some."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def shared_data() -> Path:
    """The folder of the real data sets; skips the test where it is absent."""
    default = Path(__file__).parents[2] / ".." / "shared" / "data"
    folder = Path(os.environ.get("SGLIGHT_TEST_DATA", default)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set SGLIGHT_TEST_DATA")
    return folder


def write_idx(path: Path, values: np.ndarray) -> None:
    """Writes bytes in the format of the MNIST files."""
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}i", *values.shape)
    path.write_bytes(header + values.tobytes())


@pytest.fixture
def raw_mnist(tmp_path: Path) -> Path:
    """A folder laid out as torchvision's, with 60 training and 20 test pictures."""
    raw = tmp_path / "raw_mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28), np.uint8))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return tmp_path / "raw_mnist"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """train/ and test/ with classes cat and dog: PNG pictures of 6 x 5 pixels whose level tells them apart."""
    root = tmp_path / "pictures"
    for split, count in (("train", 8), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.full((5, 6, 3), 100 * label + number, np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root
