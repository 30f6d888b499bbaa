"""Private parts of Python's multiprocessing that sglight depends on."""

from __future__ import annotations

from multiprocessing import process
from pathlib import Path


def forkserver_pid() -> int | None:
    """The process id of the server from which workers are forked; None if it does not run."""
    from multiprocessing import forkserver  # not on every system

    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def set_temporary_folder(folder: Path) -> None:
    """Let multiprocessing create its sockets in ``folder``, because its own folder would stay after SIGKILL."""
    config = process.current_process()._config  # type: ignore[attr-defined]
    config["tempdir"] = str(folder)
