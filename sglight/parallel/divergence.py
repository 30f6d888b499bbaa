"""A divergence under torchrun: all workers end with it, not those that did not find it with a lost connection.

The worker that finds it leaves its message in the store and stays until worker 0, which writes the status, knows it:
as soon as one worker ends, torchrun ends the others.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, sleep
from typing import TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]

from sglight import signals
from sglight.errors import Diverged, Terminated, interruption
from sglight.parallel import remote
from sglight.parallel.worker import comes_from_another

ASK_S = 2.0  # the longest time between a lost connection and the message of a worker that has diverged
STAY_S = 5.0  # the longest time to wait for worker 0
MESSAGE, KNOWN = "diverged", "divergence-known"  # keys in the store
Result = TypeVar("Result")


def end_together(work: Callable[[], Result]) -> Result:
    """The result of a function that a worker of torchrun runs.

    Raises:
        Diverged: if another worker has diverged, too; but only in worker 0, which prints the message.
    """
    try:
        return work()
    except BaseException as error:
        # The workers have met if there is a store. Otherwise this call would wait for them.
        met = remote.rendezvous_env.cache_info().currsize
        end = ending(error, *remote.rendezvous_env()[:2]) if met else error
    # Not above, where it would get the context of the error: that may be a signal.
    raise end


def ending(error: BaseException, store: Store, rank: int) -> BaseException:
    """The exception with which this worker ends after an error.

    Args:
        error: that it got. store: of all workers, new for each start of them. rank: of this worker.
    """
    try:
        if isinstance(error, Diverged):
            store.set(MESSAGE, str(error))
        elif interruption(error) is not None or comes_from_another(error):
            if not _has(store, MESSAGE, 0.0 if interruption(error) is not None else ASK_S):
                return error
            error = Diverged(store.get(MESSAGE).decode())
        else:
            return error
        signals.ignore()  # from torchrun, because another worker has ended
        if rank == 0:
            store.set(KNOWN, "")
        elif _has(store, KNOWN, STAY_S):
            return SystemExit(1)
    except (
        RuntimeError,
        Terminated,
    ):  # the store has gone, or torchrun ends this worker because of another failure
        pass
    return error


def _has(store: Store, key: str, within_s: float) -> bool:
    """Whether a store has a key, or gets it within some seconds."""
    deadline = monotonic() + within_s
    while not store.check([key]):
        if monotonic() >= deadline:
            return False
        sleep(0.01)
    return True
