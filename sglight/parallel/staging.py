"""Channels over a line that is slow and blocks: at either end a thread of its own works it, out of host memory.

The sender copies a tensor into a buffer and goes on computing while the thread sends it. At the other end the thread
receives ahead, as far as there are buffers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic, perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from sglight.errors import PeerLost
from sglight.link import Channel, Receiver, Sender, Waiting
from sglight.parallel.layout import FORMAT, Layout

SLICE_S = 0.05  # a signal may hit another thread; Python's handler runs once the main thread stops waiting for a moment
CLOSE_S = 2.0  # for the other end to close as well
STOP = b"\xff" * FORMAT.size

T = TypeVar("T")


class Line(ABC):
    """Carries bytes to another process, or from it."""

    @abstractmethod
    def put(self, data: Tensor) -> None:
        """Send bytes; returns when they may be overwritten. Raises `PeerLost`."""

    @abstractmethod
    def get(self, data: Tensor) -> None:
        """Receive as many bytes as there is room for. Raises `PeerLost`."""

    @abstractmethod
    def hang_up(self) -> None:
        """Make whatever is under way fail."""


class Buffer:
    """Host memory for one tensor after the other; a GPU copies from it and to it while the CPU goes on."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def room(self, size: int, pinned: bool = False) -> Tensor:
        """The first bytes, once the last copy is done; pinned if it must grow for a GPU's sake."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._memory[:size]

    def tensor(self, layout: Layout) -> Tensor:
        """What lies there."""
        return layout.on(self._memory.untyped_storage())

    def fill(self, tensor: Tensor, layout: Layout) -> None:
        """Copy a tensor in."""
        self.room(layout.size, tensor.is_cuda)
        if tensor.is_cuda:
            self._copied = fetch(tensor, self.tensor(layout))
        else:
            self.tensor(layout).copy_(tensor)

    def copy(self, layout: Layout, device: torch.device) -> Tensor:
        """What lies there, on a GPU."""
        tensor = torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=device)
        tensor.copy_(self.tensor(layout), non_blocking=True)
        self._copied = torch.cuda.Event(blocking=True)
        self._copied.record(torch.cuda.current_stream(device))
        return tensor


def fetch(tensor: Tensor, target: Tensor) -> torch.cuda.Event:
    """Copy from a GPU into pinned memory, beside what is computed there next; says when it is done."""
    if (
        tensor.stride() != target.stride()
    ):  # the copy would wait for the GPU: both must be one block of memory
        tensor = torch.empty_strided(
            target.shape, target.stride(), dtype=tensor.dtype, device=tensor.device
        ).copy_(tensor)
    stream, copied = torch.cuda.Stream(tensor.device), torch.cuda.Event(blocking=True)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        target.copy_(tensor, non_blocking=True)
    tensor.record_stream(stream)
    copied.record(stream)
    return copied


class Staged(Channel):
    """One end: a line, a thread that works it, and the buffers between that and the channel's user.

    Args:
        line: to the other end; belongs to this end from now on.
        buffers: how many tensors this end holds.
        peer: what errors call the other worker.
        waiting: entered while this end waits for the other.
    """

    def __init__(
        self,
        line: Line,
        buffers: int = 2,
        peer: str = "the other worker",
        waiting: Waiting = nullcontext,
    ) -> None:
        self.waiting = waiting
        self._line, self._peer = line, peer
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        self._full: SimpleQueue[Any] = SimpleQueue()
        for _ in range(buffers):
            self._free.put(Buffer())
        self._cause: Exception | None = None
        self._thread = Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    @abstractmethod
    def _work(self) -> None:
        """What the thread does until the sender stops."""

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._cause = error

    def _next(self, queue: SimpleQueue[T]) -> T:
        """What the thread hands over."""
        with suppress(Empty):
            return queue.get_nowait()
        with self.blocked():
            while self._thread.is_alive():
                with suppress(Empty):
                    return queue.get(timeout=SLICE_S)
        with suppress(Empty):
            return queue.get_nowait()
        raise self._lost()

    def _lost(self) -> PeerLost:
        lost = PeerLost(f"{self._peer} has gone")
        lost.__cause__ = self._cause
        return lost

    def _end(self) -> None:
        """The thread's; if need be by force."""
        if self._thread.is_alive():
            self._line.hang_up()
        self._thread.join(CLOSE_S)


class StagedSender(Staged, Sender):
    """The end that sends; arguments: see `Staged`."""

    @override
    def send(self, tensor: Tensor) -> None:
        if not self._thread.is_alive():
            raise self._lost()
        buffer, layout = self._next(self._free), Layout.of(tensor)
        start = perf_counter()
        buffer.fill(tensor.detach(), layout)
        self.moved_s += perf_counter() - start
        self._full.put((layout, buffer))

    @override
    def close(self) -> None:
        self._full.put(None)
        self._thread.join(CLOSE_S)
        self._end()

    def _work(self) -> None:
        while (item := self._full.get()) is not None:
            layout, buffer = item
            self._line.put(as_tensor(layout.packed()))
            if layout.size > 0:
                self._line.put(buffer.room(layout.size))
            self._free.put(buffer)
        self._line.put(as_tensor(STOP))


class StagedReceiver(Staged, Receiver):
    """The end that receives; tensors arrive on ``device``; other arguments: see `Staged`."""

    def __init__(
        self,
        line: Line,
        buffers: int = 2,
        device: torch.device | str = "cpu",
        peer: str = "the other worker",
        waiting: Waiting = nullcontext,
    ) -> None:
        self._device = torch.device(device)
        self._held: Buffer | None = None
        super().__init__(line, buffers, peer, waiting)

    @override
    def receive(self, shape: Sequence[int]) -> Tensor:
        self._give_back()
        layout, self._held = self._next(self._full)
        layout.check(shape, self._peer)
        if self._device.type == "cpu":
            return self._held.tensor(layout)
        tensor = self._held.copy(layout, self._device)
        self._give_back()
        return tensor

    def close(self) -> None:
        """Take what still comes, so that the sender can stop."""
        deadline = monotonic() + CLOSE_S
        self._give_back()
        while self._thread.is_alive() and monotonic() < deadline:
            with suppress(Empty):
                self._free.put(self._full.get(timeout=SLICE_S)[1])
        self._end()

    def _give_back(self) -> None:
        if self._held is not None:
            self._free.put(self._held)
        self._held = None

    def _work(self) -> None:
        header = torch.empty(FORMAT.size, dtype=torch.uint8)
        while True:
            self._line.get(header)
            message = bytes(header.tolist())
            if message == STOP:
                return
            layout, buffer = Layout.unpacked(message), self._free.get()
            data = buffer.room(layout.size, pinned=self._device.type == "cuda")
            if layout.size > 0:
                self._line.get(data)
            self._full.put((layout, buffer))


def as_tensor(message: bytes) -> Tensor:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)
