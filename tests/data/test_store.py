"""The store: complete or not there, told from other files, made once by many."""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import h5py
import numpy as np
import pytest

from sglight.data import making
from sglight.data.making import ensure
from sglight.data.store import Store, StoredArray
from sglight.errors import UserError


def fill(writer, count=50):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        writer.create(split, np.arange(count) % 5, (3, 4, 6))
        for row in range(0, count, 20):
            size = min(20, count - row)
            writer.write(split, row, generator.integers(0, 256, (size, 3, 4, 6), np.uint8))
    writer.finish([f"class {label}" for label in range(5)], name="toy", source="made up")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "toy.h5"
    ensure(path, "first", fill)
    return path


def leftovers(folder):
    return [file.name for file in folder.iterdir() if file.suffix not in (".h5", ".lock")]


def test_what_was_written_is_read(path):
    store = Store(path)
    generator = np.random.default_rng(0)
    expected = np.concatenate([generator.integers(0, 256, (n, 3, 4, 6), np.uint8) for n in (20, 20, 10)])
    assert np.array_equal(store.images["train"][0:50], expected)
    assert np.array_equal(store.labels["train"], np.arange(50) % 5)
    assert store.class_names == [f"class {label}" for label in range(5)]
    np.testing.assert_allclose(store.mean, expected.mean((0, 2, 3)) / 255)
    np.testing.assert_allclose(store.std, expected.std((0, 2, 3)) / 255)
    wanted = {"format", "version", "layout", "source", "checksum", "mean", "std", "classes", "fingerprint"}
    assert wanted <= set(store.attributes)
    assert store.attributes["layout"] == "NCHW"
    assert leftovers(path.parent) == []


def test_made_once_and_anew_when_the_source_has_changed(path):
    before = path.stat().st_mtime_ns
    ensure(path, "first", lambda writer: pytest.fail("made twice"))
    assert path.stat().st_mtime_ns == before
    ensure(path, "second", lambda writer: fill(writer, 30))
    assert len(Store(path).labels["train"]) == 30


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(path, share):
    with open(path, "r+b") as file:
        file.truncate(int(share * path.stat().st_size))
    for look in (lambda: Store(path), lambda: ensure(path, "first", fill)):
        with pytest.raises(UserError, match=r"toy\.h5 is truncated.*delete it"):
            look()


def test_a_foreign_file_is_named(tmp_path):
    text = tmp_path / "text.h5"
    text.write_text("no HDF5")
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["x"] = [1, 2]
    half = tmp_path / "half.h5"
    with h5py.File(half, "w") as file:
        file.attrs.update(format="sglight-images", version=1)
    future = tmp_path / "future.h5"
    with h5py.File(future, "w") as file:
        file.attrs.update(format="sglight-images", version=99)
    for path in (text, other, half, future):
        with pytest.raises(UserError, match=rf"{path.name} is truncated, damaged or foreign"):
            Store(path)


def test_a_changed_byte_is_found_where_it_is_read(path, monkeypatch):
    monkeypatch.setattr("sglight.data.store.BLOCK_BYTES", 5 * 72)
    ensure(path, "small blocks", fill)
    with h5py.File(path, "r") as file:
        place = file["test/images"].id.get_offset() + 23 * 72
    flip(path, place)
    store = Store(path)
    for split, rows in (("train", slice(0, 50)), ("test", slice(0, 20)), ("test", slice(25, 50))):
        assert len(store.images[split][rows]) == rows.stop - rows.start
    for rows in (slice(23, 24), slice(0, 50), slice(24, 30)):
        with pytest.raises(
            UserError, match=r"the checksum of test/images does not match at row 20.*delete it"
        ):
            store.images["test"][rows]


def flip(path, at, bit=0):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_rows_are_those_of_the_file_wherever_blocks_begin(path, monkeypatch):
    monkeypatch.setattr("sglight.data.store.BLOCK_BYTES", 7 * 72)
    whole = Store(path).images["train"][0:50]
    ensure(path, "small blocks", fill)
    images = Store(path).images["train"]
    for start, stop in ((0, 1), (3, 9), (6, 7), (7, 14), (48, 50), (0, 50)):
        assert np.array_equal(images[start:stop], whole[start:stop])


def test_a_flip_anywhere_else_is_found_before_hdf5_opens_the_file(path, monkeypatch):
    whole = bytearray(path.read_bytes())
    with h5py.File(path, "r") as file:
        images = [(file[split]["images"].id.get_offset(), 50 * 72) for split in ("train", "test")]
    monkeypatch.setattr(h5py, "File", lambda *args, **kwargs: pytest.fail("opened"))
    places = [at for at in range(len(whole)) if not any(start <= at < start + size for start, size in images)]
    used = max(at for at in range(512) if whole[at]) + 1
    places = [at for at in places if at < used or at >= 512]
    for at in np.random.default_rng(0).choice(places, 40, replace=False):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"toy\.h5 is truncated, damaged or foreign"):
            Store(path)


def test_a_store_of_the_version_before_is_made_anew(path):
    path.unlink()
    with h5py.File(path, "w") as file:
        file.attrs.update(format="sglight-images", version=1, fingerprint="first")
    ensure(path, "first", fill)
    assert Store(path).attributes["version"] == 2


@pytest.mark.parametrize("room", [1000, 2**20 + 1000])  # ends before HDF5 writes, and among the images
def test_a_full_disk_leaves_nothing_half_written(path, room):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"data_dir=.*toy\.h5 cannot be made there \(.*: free some"
        ) as info:
            ensure(path, "second", fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(info.value)
    assert Store(path).attributes["fingerprint"] == "first"
    assert leftovers(path.parent) == []


def test_whoever_waits_long_says_for_whom(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(making, "MESSAGE_AFTER_S", 0.1)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=ensure, args=(tmp_path / "new.h5", "one", lingering_fill))
    child.start()
    while not (tmp_path / ".new.h5.lock").exists() or not (tmp_path / ".new.h5.lock").read_text():
        time.sleep(0.01)
    ensure(tmp_path / "new.h5", "one", fill)
    child.join()
    said = capfd.readouterr().err
    assert f"waiting for process {child.pid} on " in said
    assert said.count("waiting for") == 1


def lingering_fill(writer):
    time.sleep(0.4)
    fill(writer)


def test_an_error_while_writing_leaves_the_old_file(path):
    def fail(writer):
        fill(writer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure(path, "second", fail)
    assert Store(path).attributes["fingerprint"] == "first"
    assert leftovers(path.parent) == []


def test_a_killed_writer_leaves_nothing_that_stays(path):
    program = textwrap.dedent(f"""
        import time, numpy as np
        from pathlib import Path
        from sglight.data.making import ensure
        def fill(writer):
            writer.create("train", np.zeros(10), (1, 2, 2))
            print("writing", flush=True)
            time.sleep(60)
        ensure(Path({str(path)!r}), "second", fill)
    """)
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "writing\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert Store(path).attributes["fingerprint"] == "first"
    assert len(leftovers(path.parent)) == 1
    ensure(path, "second", fill)
    assert leftovers(path.parent) == []
    assert Store(path).attributes["fingerprint"] == "second"


def slow_fill(writer):
    with open(os.environ["SGLIGHT_TEST_LOG"], "a") as log:
        log.write("made\n")
    time.sleep(0.3)
    fill(writer)


def make(path):
    ensure(path, "one", slow_fill)
    Store(path)


def test_two_processes_make_it_once(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("SGLIGHT_TEST_LOG", str(log))
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=make, args=(tmp_path / "data" / "new.h5",)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert log.read_text() == "made\n"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="data_dir="):
        ensure(tmp_path / "file" / "toy.h5", "first", fill)


def test_a_stored_array_in_another_layout(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), np.uint8)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["last"], file["grey"] = values, values[..., 0]
    last = StoredArray(tmp_path / "x.h5", "last", (0, 3, 1, 2))
    grey = StoredArray(tmp_path / "x.h5", "grey", (0, None, 1, 2))
    assert last.shape == (9, 3, 4, 5)
    assert grey.shape == (9, 1, 4, 5)
    assert np.array_equal(last[2:5], values[2:5].transpose(0, 3, 1, 2))
    assert np.array_equal(grey[2:5], values[2:5, None, :, :, 0])
