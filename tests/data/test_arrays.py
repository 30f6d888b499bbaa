"""The user's own arrays: layouts, types, splits, and messages that name the array."""

import h5py
import numpy as np
import pytest
import torch

from sglight.data.arrays import HDF5Data
from sglight.data.store import ensure
from sglight.errors import UserError

CLASSES = 3


def arrays(shape=(6, 5, 3), dtype=np.uint8, train=60, test=30):
    generator = np.random.default_rng(0)
    draw = lambda count: generator.integers(0, 200, (count, *shape)).astype(dtype)  # noqa: E731
    label = lambda count: np.arange(count) % CLASSES  # noqa: E731
    return {"x_train": draw(train), "y_train": label(train), "x_test": draw(test), "y_test": label(test)}


def write(path, values, **attributes):
    with h5py.File(path, "w") as file:
        for key, value in values.items():
            file[key] = value
        file.attrs.update(attributes)
    return str(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "mine.h5"


def make(path, **keys):
    data = HDF5Data(path=str(path), **keys)
    data.prepare_data()
    data.setup()
    return data


def inputs(data):
    return torch.cat([x for x, _ in data.test_dataloader()])


@pytest.mark.parametrize(
    ("shape", "layout", "expected"),
    [
        ((6, 5, 3), "auto", (3, 6, 5)),
        ((3, 6, 5), "auto", (3, 6, 5)),
        ((6, 5, 7), "channels_last", (7, 6, 5)),
        ((3, 6, 3), "channels_first", (3, 6, 3)),
        ((6, 5), "auto", (1, 6, 5)),
        ((7,), "auto", (7,)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.int16])
def test_layouts_and_types(path, shape, layout, expected, dtype):
    values = arrays(shape, dtype)
    data = make(write(path, values), layout=layout)
    assert data.shape == expected
    assert (data.train_size, data.val_size, data.test_size) == (54, 6, 30)
    raw = values["x_test"].astype(np.float64) / (255 if dtype == np.uint8 else 1)
    if len(shape) == 2:
        raw = raw[:, None]
    elif len(shape) == 3 and shape != expected:
        raw = raw.transpose(0, 3, 1, 2)
    spread = (-1, *[1] * (len(expected) - 1))
    normal = (raw - np.reshape(data.mean, spread)) / np.reshape(data.std, spread)
    torch.testing.assert_close(inputs(data), torch.from_numpy(normal).float(), atol=1e-5, rtol=1e-5)


def test_x_and_y_are_split(path):
    values = arrays((4,), np.float32, train=100)
    data = make(write(path, {"x": values["x_train"], "y": values["y_train"]}), test_fraction=0.3)
    assert data.test_size == 30
    assert data.train_size + data.val_size == 70


def test_streamed_is_the_same_set(path):
    write(path, arrays(train=300))
    whole, streamed = make(path), make(path, memory_limit=2000 / 2**30)
    for split in ("train", "val", "test"):
        batches = [getattr(data, f"{split}_dataloader")() for data in (whole, streamed)]
        first, second = (torch.cat([x for x, _ in loader]).sum((1, 2, 3)).sort()[0] for loader in batches)
        torch.testing.assert_close(first, second)


def test_class_names(path):
    assert make(write(path, arrays(), classes=["ant", "bee", "cow"])).class_names == ["ant", "bee", "cow"]
    assert make(write(path, arrays())).class_names == ["0", "1", "2"]
    with pytest.raises(UserError, match="names 2 classes, the labels have 3"):
        make(write(path, arrays(), classes=["ant", "bee"]))


def test_a_store_of_ours_is_accepted(path):
    def fill(writer):
        for split in ("train", "test"):
            writer.create(split, np.arange(30) % 3, (1, 2, 2))
            writer.write(split, 0, np.arange(120, dtype=np.uint8).reshape(30, 1, 2, 2))
        writer.finish(["a", "b", "c"], source="made up")

    ensure(path, "x", fill)
    data = make(path)
    assert data.class_names == ["a", "b", "c"]
    assert data.shape == (1, 2, 2)


def without(key):
    return {name: value for name, value in arrays().items() if name != key}


def with_labels(change):
    values = arrays()
    return {**values, "y_train": change(values["y_train"])}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (without("y_test"), "y_test missing"),
        ({"data": [1]}, "and has data"),
        (with_labels(lambda y: y[:-1]), r"y_train has shape \(59,\)"),
        (with_labels(lambda y: np.eye(3)[y]), r"y_train has shape \(60, 3\)"),
        (with_labels(lambda y: y - 1), "class numbers 0, 1, 2"),
        (with_labels(lambda y: y + 0.5), "class numbers 0, 1, 2"),
        (with_labels(lambda y: 2 * y), "class 1 has no training sample"),
        (with_labels(lambda y: np.minimum(y, 1)), "class 2 is in the test samples"),
        (arrays((4, 6, 3)), "set dataset.layout"),
        (arrays((5, 6, 7)), "set dataset.layout"),
        (arrays((3, 3, 3, 3)), "x_train has shape"),
        ({**arrays(), "x_train": np.full((60, 4), np.nan)}, "samples of shape|not finite"),
        ({**arrays((4,), float), "x_train": np.full((60, 4), np.nan)}, "not finite"),
        ({**arrays(), "x_train": arrays((8, 5, 3))["x_train"]}, "x_test has samples of shape"),
        ({**arrays(), "x_train": np.array([b"a"] * 60)}, "not real numbers"),
    ],
)
def test_wrong_contents(path, values, message):
    with pytest.raises(UserError, match=message) as info:
        make(write(path, values))
    assert f"dataset.path={path}" in str(info.value)


def test_wrong_files(path, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        make(path)
    path.write_text("text")
    with pytest.raises(UserError, match="not an HDF5 file"):
        make(path)
    write(path, arrays())
    with open(path, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match="truncated or damaged"):
        make(path)
    with pytest.raises(UserError, match=r"needs dataset\.path"):
        HDF5Data()
    with pytest.raises(UserError, match=r"dataset\.layout=nhwc"):
        HDF5Data(path="x", layout="nhwc")
