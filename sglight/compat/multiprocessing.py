"""Private parts of Python's multiprocessing that we lean on."""

from __future__ import annotations


def forkserver_pid() -> int | None:
    """The process of the server from which workers are forked, if it runs."""
    from multiprocessing import forkserver  # not everywhere

    pid: int | None = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return pid
