"""A store comes into being: once, by one of the processes that need it, complete or not at all."""

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

SAY_AFTER_S = 5.0
LOOK_EVERY_S = 0.05


def ensure(path: Path, fingerprint: str, fill: Callable[[Writer], None]) -> None:
    """Makes the store at `path` unless it is there already, made from the same source.

    Two processes that need the same store at once do not meet: the second waits, and finds it made.

    Args:
        path: where it belongs.
        fingerprint: tells one state of the source from another.
        fill: writes them; its errors of reading are `UserError`s, others are those of the store's folder.

    Raises:
        UserError: the folder cannot be written to, or a damaged file is in the way.
    """
    try:
        if _made(path, fingerprint):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path) as alone:
            if _made(path, fingerprint):
                return
            if alone:
                _sweep(path)
            _write(path, fingerprint, fill)
    except (OSError, RuntimeError) as error:  # h5py tells of a full disk as either
        reason = str(error).splitlines()[0]
        raise UserError(
            f"data_dir={path.parent}: {path.name} cannot be made there ({reason}): free some space, or choose another"
        ) from error


def _made(path: Path, fingerprint: str) -> bool:
    if not path.exists() or is_outdated(path):
        return False
    return bool(Store(path).attributes["fingerprint"] == fingerprint)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Waits for other processes that make this file; yields whether the system promises that there is none."""
    try:
        import fcntl
    except ImportError:  # not on this system: the temporary names are unique, so two writers still do no harm
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
                continue  # the process that we waited for has removed its lock: this one would bar nobody
            try:
                lock.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=lock, flush=True)
                yield True
            finally:
                os.unlink(lock.name)
            return


def _wait(lock: IO[Any], path: Path, acquire: Callable[[], None]) -> None:
    """Acquires the lock; says once whom it waits for where that takes long."""
    start, said = time.monotonic(), False
    while True:
        try:
            acquire()
            return
        except BlockingIOError:
            time.sleep(LOOK_EVERY_S)
        if not said and time.monotonic() - start > SAY_AFTER_S:
            lock.seek(0)
            owner = lock.read() or "another process"
            print(f"waiting for {owner}, which makes {path}", file=sys.stderr, flush=True)
            said = True


def _is_at(name: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(name), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sweep(path: Path) -> None:
    """Removes what killed processes left half-written."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _write(path: Path, fingerprint: str, fill: Callable[[Writer], None]) -> None:
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
