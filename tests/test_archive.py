"""Checkpoint files: every damage shows, and what is plain in them is read without running anything."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sglight.archive import check_whole, read_plain, read_record, seal
from sglight.errors import UserError


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    content = {
        "state_dict": {"weight": torch.randn(40, 20)},
        "run": {"sealed": True, "hash": "a"},
        "epoch": 3,
    }
    torch.save(content, path)
    seal(path)
    return path


def test_a_sealed_checkpoint_is_read_as_any_other(sealed: Path) -> None:
    check_whole(sealed, "it")
    for mmap in (True, False):
        assert torch.load(sealed, weights_only=True, mmap=mmap)["epoch"] == 3
    assert read_record(sealed, "it") == {"sealed": True, "hash": "a"}
    assert read_plain(sealed, "it")["epoch"] == 3


@pytest.mark.parametrize(("residual", "form"), [(False, "direct"), (True, "residual")])
def test_a_record_has_the_present_names_of_keys(tmp_path: Path, residual: bool, form: str) -> None:
    path = tmp_path / "last.ckpt"
    estimator = {"name": "mlp", "residual": residual}
    torch.save({"run": {"config": {"strategy": {"lag": 1, "estimator": estimator}}}}, path)
    expected = {"name": "mlp", "form": form}
    assert read_record(path, "it") == {"config": {"strategy": {"lag": 1, "estimator": expected}}}


def test_no_flipped_byte_and_no_truncation_is_accepted(sealed: Path) -> None:
    whole, generator = sealed.read_bytes(), np.random.default_rng(1)
    places = [*generator.integers(0, len(whole), 200), 0, len(whole) - 1, len(whole) - 40, len(whole) - 41]
    for place in map(int, places):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(generator.integers(8))
        sealed.write_bytes(changed)
        with pytest.raises(UserError, match=r"^it is damaged, or not a checkpoint.*best\.ckpt"):
            check_whole(sealed, "it")
        sealed.write_bytes(whole[:place])
        with pytest.raises(UserError, match="damaged"):
            check_whole(sealed, "it")
    sealed.write_bytes(whole)
    check_whole(sealed, "it")


def test_the_sums_of_an_unsealed_one_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "theirs.ckpt"
    torch.save({"weight": torch.zeros(100)}, path)
    check_whole(path, "it")
    data = bytearray(path.read_bytes())
    data[data.index(bytes(300)) + 150] = 7
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        check_whole(path, "it")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no checkpoint", b"x" * 500])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "it").write_bytes(content)
    for read in (check_whole, read_plain):
        with pytest.raises(UserError, match="damaged"):
            read(tmp_path / "it", "it")


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/never",)


def test_nothing_that_a_pickle_names_is_called(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "it", "w") as archive:
        archive.writestr("it/data.pkl", pickle.dumps({"run": {"a": 1}, "evil": Evil(), "object": Path()}))
    assert read_record(tmp_path / "it", "it") == {"a": 1}
    assert not Path("/tmp/never").exists()
