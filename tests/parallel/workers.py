"""Other processes for tests of what passes between processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sglight.link import Channel

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
        value = pickle.loads(self._pipe.recv_bytes())
        if isinstance(value, BaseException):
            raise value
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)


def _run(pipe: Any, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send_bytes(pickle.dumps(target(*args)))  # tensors as they are, not in shared memory
    except BaseException as error:
        pipe.send_bytes(pickle.dumps(error))


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


@contextmanager
def closing(*ends: Channel) -> Iterator[None]:
    """Close channels in the end."""
    try:
        yield
    finally:
        for end in ends:
            end.close()


class Watch:
    """Counts how often an end of a channel waits, and tells whether it does."""

    def __init__(self) -> None:
        self.times = 0
        self.now = threading.Event()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.times += 1
        self.now.set()
        yield
        self.now.clear()


def assert_same(received: Tensor, sent: Tensor) -> None:
    """Bit for bit and stride for stride."""
    assert (received.shape, received.dtype) == (sent.shape, sent.dtype)
    assert received.stride() == sent.stride()
    assert torch.equal(received.flatten().view(torch.uint8), sent.flatten().view(torch.uint8))
