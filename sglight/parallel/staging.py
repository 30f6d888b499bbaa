"""Channels over a slow line whose calls block: at each end a thread sends from, or receives into, buffers.

The sender copies a tensor into a buffer and goes on computing while its thread sends it. At the other end the thread
receives ahead, as far as there are free buffers.
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

SLICE_S = 0.05  # waiting is done in slices, see `shared.SLICE_MS`
CLOSE_S = 2.0  # how long to wait for the other end to close as well
STOP = b"\xff" * FORMAT.size  # the last message of a sender

T = TypeVar("T")


class Line(ABC):
    """Carries bytes to another process, or from it."""

    @abstractmethod
    def put(self, data: Tensor) -> None:
        """Send bytes; returns when they may be overwritten. Raises `PeerLost` if the other end has closed."""

    @abstractmethod
    def get(self, data: Tensor) -> None:
        """Receive bytes until ``data`` is full. Raises `PeerLost` if the other end has closed."""

    @abstractmethod
    def hang_up(self) -> None:
        """Make the present `put` or `get` fail."""


class Buffer:
    """Host memory that is used for one tensor after another; a GPU can copy from and to it without blocking the CPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._copied: torch.cuda.Event | None = None

    def room(self, size: int, pinned: bool = False) -> Tensor:
        """The first ``size`` bytes, after the last copy is done; new memory is ``pinned`` for copies by a GPU."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._memory[:size]

    def tensor(self, layout: Layout) -> Tensor:
        """The tensor in the buffer."""
        return layout.on(self._memory.untyped_storage())

    def fill(self, tensor: Tensor, layout: Layout) -> None:
        """Copy a tensor into the buffer."""
        self.room(layout.size, tensor.is_cuda)
        if tensor.is_cuda:
            self._copied = fetch(tensor, self.tensor(layout))
        else:
            self.tensor(layout).copy_(tensor)

    def copy(self, layout: Layout, device: torch.device) -> Tensor:
        """A copy of the tensor in the buffer, on a GPU."""
        tensor = torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=device)
        tensor.copy_(self.tensor(layout), non_blocking=True)
        self._copied = torch.cuda.Event(blocking=True)
        self._copied.record(torch.cuda.current_stream(device))
        return tensor


def fetch(tensor: Tensor, target: Tensor) -> torch.cuda.Event:
    """Copy from a GPU into pinned memory, in parallel with later computations; returns an event for its end."""
    if tensor.stride() != target.stride():
        # The copy would block unless both have the same strides.
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
    """One end of a channel: a line, a thread that uses it, and buffers between the thread and the caller.

    Args:
        line: to the other end; this end closes it.
        buffers: how many tensors fit into this end.
        peer: the name of the other worker in messages.
        waiting: makes a context that is entered while this end waits for the other.
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
        """The work of the thread, until the sender stops."""

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._cause = error

    def _next(self, queue: SimpleQueue[T]) -> T:
        """The next item that the thread puts into a queue; raises `PeerLost` if the thread has ended."""
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
        """End the thread, if necessary by breaking the line."""
        if self._thread.is_alive():
            self._line.hang_up()
        self._thread.join(CLOSE_S)


class StagedSender(Staged, Sender):
    """The sending end; arguments: see `Staged`."""

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
    """The receiving end; tensors arrive on ``device``; other arguments: see `Staged`."""

    def __init__(
        self,
        line: Line,
        buffers: int = 2,
        device: torch.device | str = "cpu",
        peer: str = "the other worker",
        waiting: Waiting = nullcontext,
    ) -> None:
        self._device = torch.device(device)
        self._in_use: Buffer | None = None  # the buffer of the last tensor
        super().__init__(line, buffers, peer, waiting)

    @override
    def receive(self, shape: Sequence[int]) -> Tensor:
        self._give_back()
        layout, self._in_use = self._next(self._full)
        layout.check(shape, self._peer)
        if self._device.type == "cpu":
            return self._in_use.tensor(layout)
        tensor = self._in_use.copy(layout, self._device)
        self._give_back()
        return tensor

    @override
    def close(self) -> None:
        """Receive and discard what is still sent, so that the sender can stop."""
        deadline = monotonic() + CLOSE_S
        self._give_back()
        while self._thread.is_alive() and monotonic() < deadline:
            with suppress(Empty):
                self._free.put(self._full.get(timeout=SLICE_S)[1])
        self._end()

    def _give_back(self) -> None:
        """Free the buffer of the last tensor."""
        if self._in_use is not None:
            self._free.put(self._in_use)
        self._in_use = None

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
    """Bytes as a tensor of uint8."""
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)
