"""Signals that ask a run to end: it does so by an exception, behind the batch under way if that does not take long."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from sglight.errors import Terminated

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE_S = 5.0  # for the batch under way and a checkpoint

_batches = 0  # within how many blocks of `waiting_for_batches` the process is
_pending: int | None = None
_elsewhere = False  # whether another worker got it
_hurried: Callable[[], bool]


def answer(hurried: Callable[[], bool] = lambda: False) -> dict[int, Any]:
    """Answer the signals by `Terminated`; those that are ignored, as under ``nohup``, stay so.

    Args:
        hurried: whether a signal that comes now is not to wait for the batch.

    Returns:
        for `restore`.
    """
    global _pending, _elsewhere, _hurried
    _pending, _elsewhere, _hurried = None, False, hurried
    before = {int(signum): signal.getsignal(signum) for signum in ENDING}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, _end)
    return before


def restore(before: dict[int, Any]) -> None:
    """Answer the signals as before `answer`."""
    for signum, handler in before.items():
        signal.signal(signum, handler)


def ignore() -> None:
    """Answer the signals no more."""
    _set_timer(0.0)
    for signum in ENDING:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def waiting_for_batches() -> Iterator[None]:
    """Within the block somebody asks `pending` behind each batch."""
    global _batches
    _batches += 1
    try:
        yield
    finally:
        _batches -= 1


def pending() -> int | None:
    """The signal that has come, if the process was to wait for the batch."""
    return _pending


def end_if_pending() -> None:
    """Raise `Terminated` if a signal has come."""
    if _pending is not None:
        _raise(_pending)


def pass_on(signum: int) -> None:
    """Treat a signal that another worker got as if it had come here."""
    global _elsewhere
    if _pending is None:
        _elsewhere = True
        _wait(signum)


def _end(signum: int, _: FrameType | None) -> None:
    if not _batches or _hurried():
        _raise(signum)
    if (
        _pending is None
    ):  # once is enough: a batch system may tell each process of a run, and the run tells its workers
        _wait(signum)


def _wait(signum: int) -> None:
    global _pending
    _pending = signum
    _set_timer(PATIENCE_S)


def _set_timer(seconds: float) -> None:
    """Give up waiting after so long; 0 for never."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGALRM, _give_up)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _give_up(*_: Any) -> None:
    if _pending is not None:
        _raise(_pending)


def _raise(signum: int) -> NoReturn:
    global _pending
    _pending = signum
    ignore()  # what follows is to be done in peace
    raise Terminated(signum, _elsewhere)
