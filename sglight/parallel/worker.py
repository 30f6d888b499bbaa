"""The code of a worker process: its status, what it takes over from its parent, and the report at its end.

Imports no torch, because the process that starts workers does not need it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import c_bool, c_char
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.sharedctypes import RawArray, RawValue
from pathlib import Path
from threading import Thread
from time import sleep
from typing import Any, NamedTuple

from sglight import signals
from sglight.errors import PeerLost, Terminated, UserError
from sglight.output import tolerate

STOP_S = 1.5  # the time between SIGTERM and SIGKILL
TEXT_BYTES = 200  # the largest length of a text in a status
SIGNALLED = 128  # the exit status of a worker that a signal has ended is this plus the number of the signal
# Parts of the messages of torch's RuntimeError if the connection to another worker is lost.
LOST_CONNECTION = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting")


class StatusTexts(NamedTuple):
    """The texts of a status at one moment; those that have not been set are empty."""

    name: str
    doing: str
    waiting: str


class Status:
    """What a worker does at present, in memory that it shares with its supervisor."""

    def __init__(self) -> None:
        self._name, self._doing, self._waiting = (RawArray(c_char, TEXT_BYTES) for _ in range(3))
        self._hurried = RawValue(c_bool, False)

    def hurry(self) -> None:
        """Make the worker end immediately after a signal, not after its batch."""
        self._hurried.value = True

    @property
    def hurried(self) -> bool:
        """Whether it should end immediately after a signal."""
        return bool(self._hurried.value)

    def set_name(self, name: str) -> None:
        """Set the worker's name, e.g. "stages 2-3"."""
        self._name.value = name.encode()[:TEXT_BYTES]

    def set_doing(self, text: str) -> None:
        """Set what it does, e.g. "batch 17"."""
        self._doing.value = text.encode()[:TEXT_BYTES]

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Set, within the block, what it waits for from another worker, e.g. "the state of batch 17"."""
        before = self._waiting.value
        self._waiting.value = text.encode()[:TEXT_BYTES]
        try:
            yield
        finally:
            self._waiting.value = before

    def read(self) -> StatusTexts:
        """The texts that have been set."""
        texts = (self._name, self._doing, self._waiting)
        return StatusTexts(*(text.value.decode(errors="ignore") for text in texts))


@dataclass(frozen=True)
class Worker:
    """The rank of a worker, and what it shares with others.

    Attributes:
        rank: its number, from 0.
        size: the number of workers.
        folder: for files and sockets of this run; its path is short enough for sockets.
        status: what it does at present.
    """

    rank: int
    size: int
    folder: Path
    status: Status


_current: Worker | None = None


def current() -> Worker | None:
    """The worker that this process is, if `launcher.launch` has started it."""
    return _current


@dataclass(frozen=True)
class Setting:
    """What workers take over from the process that starts them; the server that forks them may have other settings.

    Attributes:
        environ: the environment variables.
        threads: the number of threads of torch.
        start_method: the start method of multiprocessing, for processes that a worker starts to load data.
    """

    environ: dict[str, str]
    threads: int | None
    start_method: str

    @classmethod
    def of_this_process(cls, threads: int | None) -> Setting:
        """The setting of this process, with another number of threads."""
        own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        return cls({**os.environ, **own}, threads, multiprocessing.get_start_method())

    def apply(self) -> None:
        """Set it in this process."""
        os.environ.clear()
        os.environ.update(self.environ)
        multiprocessing.set_start_method(self.start_method, force=True)
        if self.threads is not None:
            import torch  # only workers need it, and it is slow

            torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class Returned:
    """The report of a worker whose function has returned. Only worker 0 sends the value, pickled."""

    value: bytes = b""


@dataclass(frozen=True)
class Raised:
    """The report of a worker whose function has raised an exception.

    Attributes:
        kind: the name of the class of the exception.
        message: of the exception.
        user: whether it is a `UserError`.
        lost: whether the failure of another worker is its cause.
        traceback: of the exception, as text.
        exception: the exception itself, pickled; empty if it cannot be pickled.
    """

    kind: str
    message: str
    user: bool
    lost: bool
    traceback: str
    exception: bytes

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        """The report of an exception."""
        text = "".join(traceback.format_exception(error))
        user = isinstance(error, UserError)
        lost = not user and comes_from_another(error)
        return cls(type(error).__name__, str(error), user, lost, text, _pickled_error(error))


def comes_from_another(error: BaseException | None) -> bool:
    """Whether a lost connection to another worker is among an exception's causes."""
    while error is not None:
        if isinstance(error, PeerLost | ConnectionError) or (
            isinstance(error, Terminated) and error.elsewhere
        ):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in LOST_CONNECTION):
            return True
        error = error.__cause__ or error.__context__
    return False


def _pickled_error(error: BaseException) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # fails if __init__ wants more than the message
    except Exception:
        return b""
    return data


def work(worker: Worker, pipe: connection.Connection, setting: Setting) -> None:
    """The main function of a worker process: receives a task through ``pipe``, runs it, and sends a report back."""
    global _current
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _current = worker
    report = _run_task(worker, pipe, setting)
    signals.ignore()
    with suppress(OSError):
        pipe.send_bytes(pickle.dumps(report))
    sys.exit(isinstance(report, Raised))


def _run_task(worker: Worker, pipe: connection.Connection, setting: Setting) -> Returned | Raised:
    try:
        signals.answer(lambda: worker.status.hurried)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.ENDING)  # the server blocks them
        Thread(target=_end_with_parent, args=(worker,), daemon=True).start()
        setting.apply()
        tolerate()
        function, args, kwargs = pickle.loads(pipe.recv_bytes())
        worker.status.set_doing("")
        result = function(*args, **kwargs)
        return Returned(_pickled_result(result) if worker.rank == 0 else b"")
    except Terminated as error:
        if not error.elsewhere:
            sys.exit(SIGNALLED + error.signum)
        return Raised.of(error)
    except BaseException as error:
        return Raised.of(error)


def _pickled_result(result: Any) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise TypeError(f"the result does not pickle: {error}") from error


def _end_with_parent(worker: Worker) -> None:
    """Wait for the parent's end, then end this process: by SIGTERM first, and by force after `STOP_S` seconds."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    shutil.rmtree(worker.folder.parent, ignore_errors=True)  # the folder with those of all launches
    worker.status.hurry()
    os.kill(os.getpid(), signal.SIGTERM)
    sleep(STOP_S)
    os._exit(1)
