"""Other processes for tests of what passes between processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "sglight.parallel.remote", "sglight.parallel.shared"])


class Worker:
    """A process that runs ``target(*args)``."""

    def __init__(self, target: Callable[..., Any], *args: Any) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=_run, args=(theirs, target, args), daemon=True)
        self.process.start()
        theirs.close()

    def result(self, timeout_s: float = 30.0) -> Any:
        """What it returns; or it raises here what it has raised there."""
        assert self._pipe.poll(timeout_s), "the other process does not finish"
        value = self._pipe.recv()
        if isinstance(value, BaseException):
            raise value
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)


def _run(pipe: Any, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send(target(*args))
    except BaseException as error:
        pipe.send(error)


@contextmanager
def working(target: Callable[..., Any], *args: Any) -> Iterator[Worker]:
    """A worker, which does not outlive the block."""
    worker = Worker(target, *args)
    try:
        yield worker
    finally:
        worker.kill()


def together(target: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """The results of ``target(rank, size, *args)`` in as many processes."""
    with ExitStack() as stack:
        workers = [stack.enter_context(working(target, rank, size, *args)) for rank in range(size)]
        return [worker.result() for worker in workers]


def descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def resident_mb() -> float:
    """Memory of this process, what it shares included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20
