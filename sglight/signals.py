"""Ends a run on SIGTERM or SIGHUP by raising `Terminated`, after the present batch if that does not take long.

While the results are being written a signal waits, because a run that has them is finished.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from sglight.errors import Terminated

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
PATIENCE_S = 5.0  # for the present batch and a checkpoint

_batches = 0  # how many contexts of `waiting_for_batches` are open
_answered = False  # whether the handlers are installed
_held: Any = None  # the handler of Ctrl-C before `hold`; None if signals are not held
_pending: int | None = None  # the signal that was received
_elsewhere = False  # whether another worker received it
_hurried: Callable[[], bool]  # whether to end at once


def answer(hurried: Callable[[], bool] = lambda: False) -> dict[int, Any]:
    """Install handlers that raise `Terminated`. Signals that are ignored, as under ``nohup``, stay so.

    Args:
        hurried: called when a signal comes; if true it does not wait for the end of the batch.

    Returns:
        the earlier handlers, for `restore`.
    """
    global _pending, _elsewhere, _hurried, _answered
    _release()
    _pending, _elsewhere, _hurried, _answered = None, False, hurried, True
    before = {int(signum): signal.getsignal(signum) for signum in ENDING}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, _end)
    return before


def restore(before: dict[int, Any]) -> None:
    """Install the handlers that `answer` returned; a signal that is held is forgotten."""
    global _pending, _answered
    _pending, _answered = None, False
    _release()
    for signum, handler in before.items():
        signal.signal(signum, handler)


def ignore() -> None:
    """Ignore further signals."""
    _set_timer(0.0)
    for signum in ENDING:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def waiting_for_batches() -> Iterator[None]:
    """Context in which a signal waits for the end of the batch, because `pending` is checked after each one.

    Raises:
        Terminated: at its end, if a signal came behind the last batch.
    """
    global _batches
    _batches += 1
    try:
        yield
    finally:
        _batches -= 1
    if not _batches:
        end_if_pending()


def hold(raised: int | None = None) -> None:
    """Let signals and Ctrl-C wait from now on, because the results are complete or being written.

    Args:
        raised: the number of a signal that has been raised already, but too late to end the run.
    """
    global _held, _pending
    if not _answered:
        return
    if _held is None:
        _held = signal.getsignal(signal.SIGINT) or signal.SIG_DFL
        if _held is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, _end)
    _pending = _pending if raised is None else raised


def release() -> None:
    """Undo `hold`.

    Raises:
        Terminated: if a signal has waited.
    """
    _release()
    end_if_pending()


def _release() -> None:
    global _held
    if _held is not None:
        _set_timer(0.0)
        signal.signal(signal.SIGINT, _held)
        _held = None


def pending() -> int | None:
    """The number of a signal that waits for the end of the batch; None if there is none."""
    return _pending


def end_if_pending() -> None:
    """Raise `Terminated` if a signal waits for the end of the batch."""
    if _pending is not None:
        _raise(_pending)


def pass_on(signum: int) -> None:
    """Treat a signal that another worker received as if this process had received it."""
    global _elsewhere
    if _pending is None:
        _elsewhere = True
        _wait(signum)


def _end(signum: int, _: FrameType | None) -> None:
    """The handler of signals."""
    if _held is None and (not _batches or _hurried()):
        _raise(signum)
    # Only the first signal counts: a batch system may send one to each process, and the run passes it on as well.
    if _pending is None:
        _wait(signum)


def _wait(signum: int) -> None:
    """Remember the signal until the end of the batch or of what is written, but not longer than `PATIENCE_S`."""
    global _pending
    _pending = signum
    _set_timer(PATIENCE_S)


def _set_timer(seconds: float) -> None:
    """Stop waiting after so many seconds; 0 switches the timer off."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.signal(signal.SIGALRM, _give_up)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _give_up(*_: Any) -> None:
    if _pending is not None:
        _raise(_pending)


def _raise(signum: int) -> NoReturn:
    global _pending
    _pending = signum
    ignore()  # so that no second signal interrupts the cleaning up
    raise Terminated(signum, _elsewhere)
