"""Signals that ask a run to end: it does so by an exception, behind the batch under way if that does not take long."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sglight.errors import Terminated

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE_S = 3.0  # for the batch under way

_batches = 0  # within how many blocks of `waiting_for_batches` the process is
_pending: int | None = None


def answer() -> dict[int, Any]:
    """Answer the signals by `Terminated`; those that are ignored, as under ``nohup``, stay so.

    Returns:
        for `restore`.
    """
    global _pending
    _pending = None
    before = {int(signum): signal.getsignal(signum) for signum in ENDING}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, _end)
    return before


def restore(before: dict[int, Any]) -> None:
    """Answer the signals as before `answer`."""
    for signum, handler in before.items():
        signal.signal(signum, handler)


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
        signal.setitimer(signal.ITIMER_REAL, 0)
        _raise(_pending)


def _end(signum: int, _: FrameType | None) -> None:
    global _pending
    if _batches and _pending is None:
        _pending = signum
        signal.signal(signal.SIGALRM, lambda *_: _raise(signum))
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        return
    _raise(signum)


def _raise(signum: int) -> None:
    global _pending
    _pending = signum
    for ending in ENDING:  # once is enough: what follows is to be done in peace
        signal.signal(ending, signal.SIG_IGN)
    raise Terminated(signum)
