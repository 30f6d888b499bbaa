"""Folders of processes that start workers: what is left of one that was killed goes with the next launch.

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
# In each of them. The process that made one holds a lock on it, which the system lifts when that process has gone.
MARK = ".made-by-sglight"
FOLDER_BYTES = 50  # in longer paths there is no room for sockets, whose paths end at 104

# Of this process, and its number: a fork has none yet.
_own: tuple[int, Path] | None = None


@contextmanager
def launch_folder() -> Iterator[Path]:
    """A folder for the workers of one launch, which is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="", dir=process_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def process_folder() -> Path:
    """The folder of this process, for its user alone, which is gone when it ends.

    Folders of processes that were killed are removed beside it.
    """
    global _own
    if _own is None or _own[0] != os.getpid() or not _own[1].is_dir():
        parent = tempfile.gettempdir()
        parent = parent if len(os.fsencode(parent)) <= FOLDER_BYTES else "/tmp"
        remove_abandoned(Path(parent))
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        _lock(folder)
        (folder / MARK).touch()  # last: whoever sees it finds the lock held
        util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=-100)
        set_temporary_folder(folder)
        _own = os.getpid(), folder
    return _own[1]


def remove_abandoned(parent: Path) -> None:
    """Remove the folders of processes that have gone, as after SIGKILL."""
    for mark in parent.glob(f"{PREFIX}*/{MARK}"):
        if (descriptor := _lock(mark.parent)) is not None:
            shutil.rmtree(mark.parent, ignore_errors=True)
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed, or this process ends.

    Nothing if another process holds it, or it is another user's, or where there are no locks.
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
