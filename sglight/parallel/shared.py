"""Channels between two processes on one Linux machine: tensors are in shared memory, a socket carries their headers.

The sender copies a tensor into a free slot and sends a header. The receiver uses the tensor in the slot, and returns
the slot (one byte) when it asks for the next tensor. Slots are memfds: they need no room in /dev/shm, have no name, and
disappear with the processes.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage
from typing_extensions import override

from sglight.errors import PeerLost
from sglight.link import Channel, Receiver, Sender, Waiting
from sglight.parallel.layout import FORMAT, Layout

# Waiting is done in slices, because a signal may reach another thread, and Python runs its handler only when the main
# thread stops waiting.
SLICE_MS = 50
MAX_SLOTS = 64  # the largest number of slots: so many headers fit into a socket
PREFIX = struct.Struct("<BQ")
HEADER_SIZE = PREFIX.size + FORMAT.size


class Header(NamedTuple):
    """The message about a tensor.

    Attributes:
        slot: the number of its slot.
        capacity: the bytes of new memory of the slot, whose descriptor comes with the message; 0 if it has not changed.
        layout: of the tensor.
    """

    slot: int
    capacity: int
    layout: Layout

    def packed(self) -> bytes:
        """The header as bytes, always of the same length."""
        return PREFIX.pack(self.slot, self.capacity) + self.layout.packed()

    @classmethod
    def unpacked(cls, message: bytes) -> Header:
        """The header that `packed` wrote."""
        slot, capacity = PREFIX.unpack_from(message)
        return cls(slot, capacity, Layout.unpacked(message[PREFIX.size :]))


def mapped(descriptor: int, capacity: int) -> UntypedStorage:
    """The memory of a descriptor as a storage; it stays mapped as long as the storage or a tensor in it exists."""
    return torch.frombuffer(mmap.mmap(descriptor, capacity), dtype=torch.uint8).untyped_storage()


class End(Channel):
    """One end of a channel.

    Args:
        sock: a connected unix stream socket, which this end will close.
        peer: the name of the other worker in messages.
        waiting: makes a context that is entered while this end waits for the other.
    """

    def __init__(
        self, sock: socket.socket, peer: str = "the other worker", waiting: Waiting = nullcontext
    ) -> None:
        self.waiting = waiting
        self._sock, self._peer = sock, peer
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    @override
    def close(self) -> None:
        self._sock.close()

    def _arrived(self, timeout_ms: int = 0) -> bool:
        return bool(self._poll.poll(timeout_ms))

    def _wait(self) -> None:
        """Wait until there is something to read, or the other end has closed."""
        if not self._arrived():
            with self.blocked():
                while not self._arrived(SLICE_MS):
                    pass

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Context that raises `PeerLost` if the other end has closed."""
        try:
            yield
        except (ConnectionError, EOFError) as error:
            raise PeerLost(f"{self._peer} has gone") from error


class SharedSender(End, Sender):
    """The sending end, which copies tensors into slots; it makes and enlarges slots as needed.

    Args:
        sock, peer, waiting: see `End`.
        slots: the largest number of tensors on their way or in use by the receiver, up to `MAX_SLOTS`.
    """

    def __init__(
        self,
        sock: socket.socket,
        slots: int = 4,
        peer: str = "the other worker",
        waiting: Waiting = nullcontext,
    ) -> None:
        assert 1 <= slots <= MAX_SLOTS
        super().__init__(sock, peer, waiting)
        self._limit = slots
        self._slots: list[UntypedStorage] = []
        self._free: list[int] = []

    @override
    def send(self, tensor: Tensor) -> None:
        layout = Layout.of(tensor)
        slot = self._take(layout.size)
        descriptors = self._grow(slot, layout.size)
        start = perf_counter()
        layout.on(self._slots[slot]).copy_(tensor.detach())
        self.moved_s += perf_counter() - start
        self._post(Header(slot, self._slots[slot].nbytes() if descriptors else 0, layout), descriptors)

    @override
    def close(self) -> None:
        super().close()
        self._slots.clear()

    def _take(self, size: int) -> int:
        """Take a free slot: the smallest with enough room, or else the largest."""
        if self._arrived():
            self._collect()
        if not self._free and len(self._slots) < self._limit:
            self._free.append(len(self._slots))
            self._slots.append(UntypedStorage(0))
        if not self._free:
            self._wait()
            self._collect()
        room = {slot: self._slots[slot].nbytes() - size for slot in self._free}
        slot = min(room, key=lambda slot: (room[slot] < 0, abs(room[slot])))
        self._free.remove(slot)
        return slot

    def _collect(self) -> None:
        """Add the slots that were returned to the free ones."""
        with self._connected():
            returned = self._sock.recv(MAX_SLOTS)
            if not returned:
                raise EOFError
        self._free.extend(returned)

    def _grow(self, slot: int, size: int) -> list[int]:
        """Give a slot new memory if it is too small; returns the descriptor of that in a list, else an empty list."""
        if self._slots[slot].nbytes() >= max(size, 1):
            return []
        capacity = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor = os.memfd_create("sglight")
        os.ftruncate(descriptor, capacity)
        self._slots[slot] = mapped(descriptor, capacity)
        return [descriptor]

    def _post(self, header: Header, descriptors: list[int]) -> None:
        try:
            with self._connected():
                socket.send_fds(self._sock, [header.packed()], descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)


class SharedReceiver(End, Receiver):
    """The receiving end, whose tensors are in the slots of the sender; arguments: see `End`."""

    def __init__(
        self, sock: socket.socket, peer: str = "the other worker", waiting: Waiting = nullcontext
    ) -> None:
        super().__init__(sock, peer, waiting)
        self._slots: dict[int, UntypedStorage] = {}
        self._in_use = b""  # the slot of the last tensor

    @override
    def receive(self, shape: Sequence[int]) -> Tensor:
        self._give_back()
        self._wait()
        header, descriptors = self._header()
        for descriptor in descriptors:
            self._slots[header.slot] = mapped(descriptor, header.capacity)
            os.close(descriptor)
        self._in_use = bytes([header.slot])
        header.layout.check(shape, self._peer)
        return header.layout.on(self._slots[header.slot])

    @override
    def close(self) -> None:
        super().close()
        self._slots.clear()

    def _give_back(self) -> None:
        """Return the slot of the last tensor. If the sender has closed, its other tensors can still be received."""
        with suppress(ConnectionError):
            self._sock.send(self._in_use)
        self._in_use = b""

    def _header(self) -> tuple[Header, list[int]]:
        with self._connected():
            # Headers are written in one piece, and nothing else is, so they are read in one piece.
            message, descriptors, _, _ = socket.recv_fds(self._sock, HEADER_SIZE, 1, socket.MSG_CMSG_CLOEXEC)
            if not message:
                raise EOFError
        return Header.unpacked(message), descriptors


def connect(folder: Path, name: str, listen: bool, timeout_s: float = 60.0) -> socket.socket:
    """Connect to another process, which calls this with the same name and the opposite ``listen``.

    Args:
        folder: private to the two processes; the path of the socket in it is removed when they are connected.
        name: of the connection.
        listen: whether this process is the one that listens.
        timeout_s: how long to wait.

    Raises:
        PeerLost: if the other process does not connect in time.
    """
    deadline = monotonic() + timeout_s
    descriptor = os.open(folder, os.O_DIRECTORY)
    try:
        path = f"/proc/self/fd/{descriptor}/{name}"  # short: the path of a socket may have 107 bytes at most
        return _accept(path, deadline) if listen else _reach(path, deadline)
    except TimeoutError as error:
        raise PeerLost(f"nobody came to {folder / name} within {timeout_s:g} s") from error
    finally:
        os.close(descriptor)


def _accept(path: str, deadline: float) -> socket.socket:
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        try:
            door.listen(1)
            door.settimeout(SLICE_MS / 1000)
            while True:
                with suppress(TimeoutError):
                    return door.accept()[0]
                _check(deadline)
        finally:
            os.unlink(path)


def _reach(path: str, deadline: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    while True:
        try:
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            _check(deadline)
            sleep(0.005)


def _check(deadline: float) -> None:
    if monotonic() > deadline:
        raise TimeoutError
