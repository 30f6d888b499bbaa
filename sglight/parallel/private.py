"""Temporary folders of the processes that start workers. A launch removes those of earlier processes that were killed.

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import util
from pathlib import Path

from sglight.compat.multiprocessing import set_temporary_folder

PREFIX = "sglight-"
# A file in each folder. The process that made the folder keeps a lock on it until it ends.
MARK = ".made-by-sglight"
FOLDER_BYTES = 50  # a socket in a folder with a longer path may exceed the limit of 104 bytes

# The process and its folder; a forked process must make a folder of its own.
_own: tuple[int, Path] | None = None


@contextmanager
def launch_folder() -> Iterator[Path]:
    """Context with a folder for the workers of one launch, which is removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="", dir=process_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def process_folder() -> Path:
    """The folder of this process, which only its user can read; it is removed when the process ends.

    The first call also removes folders of processes that were killed.
    """
    global _own
    if _own is None or _own[0] != os.getpid() or not _own[1].is_dir():
        parent = tempfile.gettempdir()
        parent = parent if len(os.fsencode(parent)) <= FOLDER_BYTES else "/tmp"
        remove_abandoned(Path(parent))
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        _lock(folder)
        (folder / MARK).touch()  # after the lock, so that a folder with a mark is never without its lock
        util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
        set_temporary_folder(folder)
        _own = os.getpid(), folder
    return _own[1]


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of processes that have ended without removing them, as after SIGKILL."""
    for mark in parent.glob(f"{PREFIX}*/{MARK}"):
        if (descriptor := _lock(mark.parent)) is not None:
            shutil.rmtree(mark.parent, ignore_errors=True)
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Lock a folder, until the descriptor that is returned is closed or this process ends.

    Returns None if another process has the lock, if the folder belongs to another user, or if there are no locks.
    """
    if os.name == "nt":
        return None
    import fcntl

    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor
    return None
