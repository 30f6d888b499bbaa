"""Creates a store: once, by one of the processes that need it, and completely or not at all."""

import contextlib
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sglight.data.store import Store, Writer, close_off, is_outdated, new_file
from sglight.errors import UserError

MESSAGE_AFTER_S = 5.0  # waiting for another process longer than this is reported
POLL_INTERVAL_S = 0.05


def ensure(path: Path, fingerprint: str, fill: Callable[[Writer], None]) -> None:
    """Makes the store at `path`, unless there is one already from the same source.

    If two processes need a store at once, the second waits until the first has made it.

    Args:
        path: of the store.
        fingerprint: identifies the state of the source; a store with another one is made anew.
        fill: writes the contents. It raises `UserError` if the source cannot be read; other errors are taken for
            errors of writing the store.

    Raises:
        UserError: the source cannot be read, the folder cannot be written to, or `path` is a damaged file.
    """
    try:
        if _is_made(path, fingerprint):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as alone:
            if _is_made(path, fingerprint):
                return
            if alone:
                _remove_leftovers(path)
            _write(path, fingerprint, fill)
    except (OSError, RuntimeError) as error:  # h5py raises either on a full disk
        reason = str(error).splitlines()[0]
        raise UserError(
            f"data_dir={path.parent}: {path.name} cannot be made there ({reason}): free some space, or choose another"
        ) from error


def _is_made(path: Path, fingerprint: str) -> bool:
    """Whether there is a store from the source with that fingerprint."""
    if not path.exists() or is_outdated(path):
        return False
    return bool(Store(path).attributes["fingerprint"] == fingerprint)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Waits until no other process makes this store; yields whether the system can guarantee that."""
    try:
        import fcntl
    except ImportError:  # a system without it: temporary names are unique, so two writers do no harm
        yield False
        return
    while True:
        with open(path.with_name(f".{path.name}.lock"), "a+") as lock:
            try:
                _wait(lock, path, lambda: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except OSError:  # a file system without locks
                yield False
                return
            if not _is_at(lock.name, lock.fileno()):
                continue  # the process before has removed this file, so that locking it would exclude nobody
            try:
                lock.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=lock, flush=True)
                yield True
            finally:
                os.unlink(lock.name)
            return


def _wait(lock: IO[Any], path: Path, acquire: Callable[[], None]) -> None:
    """Acquires the lock; if that takes long, prints once which process it waits for."""
    start, reported = time.monotonic(), False
    while True:
        try:
            acquire()
            return
        except BlockingIOError:
            time.sleep(POLL_INTERVAL_S)
        if not reported and time.monotonic() - start > MESSAGE_AFTER_S:
            lock.seek(0)
            owner = lock.read() or "another process"
            print(f"waiting for {owner}, which makes {path}", file=sys.stderr, flush=True)
            reported = True


def _is_at(name: str, descriptor: int) -> bool:
    """Whether an open file is still the one with that name."""
    try:
        return os.path.samestat(os.stat(name), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_leftovers(path: Path) -> None:
    """Removes incomplete files of processes that were killed."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _write(path: Path, fingerprint: str, fill: Callable[[Writer], None]) -> None:
    """Writes a temporary file, which takes the name of the store when it is complete and on the disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with (
            Progress(*columns, console=Console(stderr=True)) as progress,
            new_file(temporary) as file,
            open(temporary, "r+b", buffering=0) as raw,
        ):
            task = progress.add_task(f"making {path.name}", total=None, visible=False)
            file.attrs["fingerprint"] = fingerprint
            writer = Writer(file, raw, progress, task)
            fill(writer)
            places = writer.places()
        close_off(temporary, places)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
