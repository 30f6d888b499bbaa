"""Private parts of Python's multiprocessing that we lean on."""

from __future__ import annotations

from multiprocessing import process
from pathlib import Path


def forkserver_pid() -> int | None:
    """The process of the server from which workers are forked, if it runs."""
    from multiprocessing import forkserver  # not everywhere

    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid


def set_temporary_folder(folder: Path) -> None:
    """Have multiprocessing make its sockets in ``folder``, and not in one of its own that stays after SIGKILL."""
    config = process.current_process()._config  # type: ignore[attr-defined]
    config["tempdir"] = str(folder)
