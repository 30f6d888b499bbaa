"""Folders of processes: private, short, and removed by the next process where one was killed."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglight.parallel import private
from sglight.parallel.private import MARK, launch_folder, process_folder, remove_abandoned

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where folders are made, for processes forked in the test."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def forked(function: Callable[[], None]) -> int:
    """The exit code of a process that calls `function`."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        function()
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_a_folder_is_private_and_that_of_a_launch_goes_with_it(beside: Path) -> None:
    def check() -> None:
        with launch_folder() as folder:
            assert folder.parent == process_folder() and folder.parent.parent == beside
            assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
        assert os.listdir(process_folder()) == [MARK]

    assert forked(check) == 0


def test_in_a_long_path_there_would_be_no_room_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * private.FOLDER_BYTES)
        assert process_folder().parent == Path("/tmp")
        process_folder().joinpath(MARK).unlink()
        process_folder().rmdir()

    assert forked(check) == 0


def test_what_a_killed_process_leaves_goes_with_the_next_and_nothing_else(beside: Path) -> None:
    def killed() -> None:
        process_folder().joinpath("listener").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed) == -signal.SIGKILL
    (left,) = beside.iterdir()
    (beside / "sglight-mine").mkdir()
    (beside / "sglight-mine" / "notes").touch()

    def next_one() -> None:
        mine = process_folder()
        assert not left.exists() and (beside / "sglight-mine" / "notes").exists()
        assert forked(lambda: remove_abandoned(beside)) == 0
        assert mine.exists(), "its process lives"

    assert forked(next_one) == 0
