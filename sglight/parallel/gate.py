"""Lets all workers of a machine end after the same batch when one of them gets a signal."""

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
    """A page of memory shared by all workers, which may be batches apart, to agree on a point at which to end.

    As long as no worker asks for it, passing a point costs no waiting. At a point (the end of a batch) a worker may
    wait, because no other worker needs anything from it before its next point. In the page each worker writes 2 p when
    it waits at point p, and 2 p + 1 when it has passed it. All end at the first point at which all wait.

    Args:
        path: of a file, the same for all workers; it may be removed when all have opened it.
        rank: of this worker.
        size: the number of workers.
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
        """Whether all workers end at this point because of a signal: its number, or None.

        Args:
            point: a number that grows from call to call, the same at all workers.
            signum: the signal that this worker got; None for none.
            waiting: makes a context that is entered while it waits for the others.
        """
        if signum is not None:
            self._asked[0] = signum
        asked = self._asked[0]
        if asked:
            signals.pass_on(asked)  # so that this worker does not wait for ever
            self._places[self._rank] = 2 * point
            with waiting():
                while max(self._places) <= 2 * point:
                    if min(self._places) == 2 * point:
                        return asked
                    sleep(POLL_S)
        self._places[self._rank] = 2 * point + 1
        return None
