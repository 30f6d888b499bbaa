"""The user's own arrays: layouts, types, splits, and messages that name the array."""

import os
import subprocess

import h5py
import numpy as np
import pytest
import torch

from sglight.data import arrays as module
from sglight.data.arrays import HDF5Data
from sglight.data.making import ensure
from sglight.data.probe import Unreadable, survey
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


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The probe without its process, which takes half a second."""

    def probe(path, keys):
        try:
            return survey(path, keys)
        except (OSError, RuntimeError) as error:
            raise Unreadable(str(error)) from error

    whole = module.probe
    monkeypatch.setattr(module, "probe", probe)
    return whole


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


def with_bad(key):
    values = arrays((4,), np.float32)
    values[key][7, 2], values[key][9, 0] = np.nan, -np.inf
    return values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (without("y_test"), "y_test missing"),
        (without("x_train"), "x_train missing"),
        ({"data": [1]}, "and has data"),
        (with_labels(lambda y: y[:-1]), r"y_train has shape \(59,\)"),
        (with_labels(lambda y: np.eye(3)[y]), r"y_train has shape \(60, 3\)"),
        (with_labels(lambda y: y - 1), "class numbers 0, 1, 2"),
        (with_labels(lambda y: y + 0.5), "class numbers 0, 1, 2"),
        (with_labels(lambda y: 2 * y), "class 1 has no training sample"),
        (with_labels(lambda y: np.minimum(y, 1)), "class 2 is in the test samples"),
        (with_labels(lambda y: y * 2_000_000_000), "class 1 has no training sample"),
        (with_labels(lambda y: y.astype(np.uint64) + 2**63), "class numbers 0, 1, 2"),
        (with_labels(lambda y: y * 1e300), "class numbers 0, 1, 2"),
        (with_labels(lambda y: np.where(y == 1, np.inf, y)), "y_train holds 20 numbers that are not finite"),
        (with_labels(lambda y: np.array([b"no", b"yes", b"so"])[y]), "class numbers 0, 1, 2"),
        (with_labels(lambda y: h5py.Empty("i8")), "y_train has shape None"),
        ({**arrays(), "x_train": h5py.Empty("f4")}, "x_train"),
        ({**arrays(), "x_val": arrays()["x_test"]}, "y_val missing"),
        ({**arrays(), "x_test": arrays()["x_test"].astype(float)}, "x_test or x_train is of bytes"),
        (with_labels(lambda y: 0 * y), "class 2 is in the test samples but"),
        (arrays((4, 6, 3)), "set dataset.layout"),
        (arrays((5, 6, 7)), "set dataset.layout"),
        (arrays((3, 3, 3, 3)), "x_train has shape"),
        ({**arrays(), "x_train": np.full((60, 4), np.nan)}, "x_train holds 240 numbers"),
        (with_bad("x_train"), r"x_train holds 2 numbers that are not finite .*, the first in row 7: replace"),
        (with_bad("x_test"), r"x_test holds 2 numbers that are not finite .*, the first in row 7: replace"),
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


def test_a_validation_set_of_its_own(path):
    values = arrays((4,), np.float32)
    values |= {"x_val": values["x_test"] + 1000, "y_val": values["y_test"]}
    data = make(write(path, values))
    assert (data.train_size, data.val_size, data.test_size) == (60, 30, 30)
    x = torch.cat([x for x, _ in data.val_dataloader()]) * torch.tensor(data.std) + torch.tensor(data.mean)
    torch.testing.assert_close(x, torch.from_numpy(values["x_val"]), atol=1e-2, rtol=0)


def test_training_samples_alone_are_split(path):
    data = make(write(path, {key: value for key, value in arrays().items() if "train" in key}))
    assert (data.train_size, data.val_size, data.test_size) == (43, 5, 12)


def test_what_is_not_used_is_told(path):
    assert make(write(path, {**arrays(), "extra": [1], "x": [2]})).notes == [f"{path}: extra, x not used"]


@pytest.mark.parametrize(
    "names",
    [
        ["ant", "bee", "cow"],
        np.array([b"ant", b"bee", b"cow"]),
        '["ant", "bee", "cow"]',
        np.bytes_(b'["ant", "bee", "cow"]'),
    ],
)
def test_class_names_in_all_their_forms(path, names):
    assert make(write(path, arrays(), classes=names)).class_names == ["ant", "bee", "cow"]


@pytest.mark.parametrize(
    "names",
    [
        3,
        1.5,
        "ant",
        "{}x",
        b"\xff",
        [1, 2, 3],
        "[1, 2, 3]",
        ["ant", "ant", "cow"],
        h5py.Empty("S1"),
        np.zeros((3, 2)),
    ],
)
def test_class_names_in_no_form(path, names):
    with pytest.raises(
        UserError, match=r"the attribute classes must be a list of strings .*: |mend or delete it"
    ):
        make(write(path, arrays(), classes=names))


def test_groups_are_named(path):
    with h5py.File(path, "w") as file:
        for key in arrays():
            file.create_group(key)["block0_values"] = np.zeros((4, 2))
    with pytest.raises(UserError, match=r"x_train is a group of block0_values, not an array: .*to_numpy"):
        make(path)


def test_numbers_in_other_files_are_refused(path, tmp_path):
    x, y = np.arange(400.0).reshape(100, 4), np.arange(100) % 2
    write(tmp_path / "other.h5", {"x": x})
    (tmp_path / "raw.bin").write_bytes(x.tobytes())
    layout = h5py.VirtualLayout(x.shape, x.dtype)
    layout[:] = h5py.VirtualSource("gone.h5", "x", x.shape)
    makers = (
        lambda file: file.create_virtual_dataset("x", layout),
        lambda file: file.create_dataset(
            "x", x.shape, x.dtype, external=[(str(tmp_path / "raw.bin"), 0, x.nbytes)]
        ),
        lambda file: file.__setitem__("x", h5py.ExternalLink("other.h5", "x")),
    )
    for maker in makers:
        with h5py.File(path, "w") as file:
            maker(file)
            file["y"] = y
        with pytest.raises(UserError, match=r"x takes its numbers from other files .*copy them here"):
            make(path)


def test_a_missing_filter_is_no_damage(path):
    x, y = np.zeros((100, 4), np.float32), np.arange(100) % 2
    with h5py.File(path, "w") as file:
        file["y"] = y
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk(x.shape)
        plist.set_filter(32999, h5py.h5z.FLAG_OPTIONAL, (3,))
        space = h5py.h5s.create_simple(x.shape)
        array = h5py.h5d.create(file.id, b"x", h5py.h5t.NATIVE_FLOAT, space, plist)
        array.write_direct_chunk((0, 0), bytes(400), 0)
    with pytest.raises(
        UserError, match=r"x is packed by the HDF5 filter 32999, which is not installed: .*h5repack"
    ):
        make(path)


@pytest.mark.parametrize("shift", [0.0, 1.7e9, -4e12])
@pytest.mark.parametrize("limit", [4.0, 1000 / 2**30])
def test_double_precision_is_rounded_after_it_is_centred(path, shift, limit):
    y = np.arange(200) % 2
    x = np.random.default_rng(0).normal(size=(200, 1)) + 4 * y[:, None] + shift
    data = make(write(path, {"x_train": x, "y_train": y, "x_test": x, "y_test": y}), memory_limit=limit)
    torch.testing.assert_close(
        inputs(data), torch.from_numpy((x - x.mean()) / x.std()).float(), rtol=1e-3, atol=1e-3
    )


def test_large_numbers_do_not_overflow(path):
    values = arrays((4,), np.float64)
    big = {key: value * 1e250 if key[0] == "x" else value for key, value in values.items()}
    with pytest.raises(UserError, match="too large or not finite"):
        make(write(path, big))
    big = {key: value * 1e100 if key[0] == "x" else value for key, value in values.items()}
    one, other = inputs(make(write(path, values))), inputs(make(write(path, big)))
    torch.testing.assert_close(one, other)
    values["x_test"][3] = 1e300
    with pytest.raises(UserError, match=rf"dataset\.path={path}: row 3 is not finite, or too far"):
        make(write(path, values))


def test_a_constant_feature_stays_constant(path):
    values = arrays((2,), np.float64)
    for key in ("x_train", "x_test"):
        values[key][:, 0] = 14.62
    assert inputs(make(write(path, values)))[:, 0].abs().max() < 1e-5


def test_alike_samples_are_refused(path):
    values = {key: value * 0 if key[0] == "x" else value for key, value in arrays().items()}
    with pytest.raises(UserError, match=rf"dataset\.path={path}: the training samples are all the same"):
        make(write(path, values))
    with pytest.raises(UserError, match="has one class, 0: at least two"):
        make(write(path, {key: value * 0 if key[0] == "y" else value for key, value in arrays().items()}))


def test_a_changed_file_is_told_and_a_decayed_one_refused(path, tmp_path, monkeypatch):
    keys = {"data_dir": str(tmp_path / "data")}
    write(path, arrays())
    assert make(path, **keys).notes == []
    monkeypatch.setattr(module, "probe", lambda *args: pytest.fail("read twice"))
    assert make(path, **keys).notes == []
    os.utime(path, (1, 1))
    assert make(path, **keys).notes == []
    monkeypatch.setattr(module, "probe", survey)
    data = path.read_bytes()
    at = data.index(arrays()["x_train"].tobytes()) + 500
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    (note,) = make(path, **keys).notes
    assert "has changed since 20" in note
    assert make(path, **keys).notes == []
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"though nobody has written to it: .*restore it, or delete .*\.json"):
        make(path, **keys)


def test_a_file_that_ends_the_hdf5_library_is_named(path, in_this_process, monkeypatch):
    monkeypatch.setattr(module, "probe", in_this_process)
    assert make(write(path, arrays((4,), np.float32))).train_size == 54
    done = subprocess.CompletedProcess([], -11, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(
        UserError, match=r"it is truncated or damaged \(the HDF5 library fails on it with signal 11\)"
    ):
        make(path)
