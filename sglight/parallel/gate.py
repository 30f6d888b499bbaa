"""How workers of one machine, which are batches apart, end behind the same one when a signal asks one of them to."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import sleep

from sglight import signals

POLL_S = 1e-3
ENTRY_BYTES = 8


class Gate:
    """A page of memory that all workers see. As long as nobody asks, passing a point costs no waiting.

    Behind a point no worker needs anything of those that have reached it, so that they may wait there for the others.
    Each notes 2 p when it stands at point p, and 2 p + 1 once it has passed it. All end at the first point at which all
    stand.

    Args:
        path: of a file that all workers give, made by whoever comes first; it may be removed once all are here.
        rank: of this worker. size: how many there are.
    """

    def __init__(self, path: Path, rank: int, size: int) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, ENTRY_BYTES * (1 + size))
            memory = memoryview(mmap.mmap(descriptor, ENTRY_BYTES * (1 + size)))
        finally:
            os.close(descriptor)
        self._asked, self._places, self._rank = (
            memory[:ENTRY_BYTES].cast("q"),
            memory[ENTRY_BYTES:].cast("q"),
            rank,
        )

    def stops(
        self,
        point: int,
        signum: int | None,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> int | None:
        """The signal because of which all workers end at this point, if they do.

        Args:
            point: larger than that of the call before; all workers come to the same ones.
            signum: the signal that has reached this worker. waiting: entered while it waits for the others.
        """
        if signum is not None:
            self._asked[0] = signum
        asked = self._asked[0]
        if asked:
            signals.pass_on(asked)  # from now on this worker has not for ever either
            self._places[self._rank] = 2 * point
            with waiting():
                while max(self._places) <= 2 * point:
                    if min(self._places) == 2 * point:
                        return asked
                    sleep(POLL_S)
        self._places[self._rank] = 2 * point + 1
        return None
