"""Workers that talk by torch.distributed: all of them to each other, and neighbours that share no memory.

The process groups are our own: with `init_process_group` Lightning would take over and keep the workers in step.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore, PrefixStore, Store, Work, rendezvous  # type: ignore[attr-defined]
from typing_extensions import override

from sglight.compat.torch import Group, loopback_gloo
from sglight.compat.torch import nccl as make_nccl
from sglight.errors import PeerLost
from sglight.link import Peers, Pending, Receiver, Replicas, Sender, Waiting, Waits
from sglight.parallel.gate import Gate
from sglight.parallel.staging import Line, StagedReceiver, StagedSender

MEET_S = 120.0  # for all workers to come
# For a transfer to be answered: who has gone is noticed at once, and who is busy is waited for.
ANSWER = timedelta(days=1)


def rendezvous_file(folder: Path, rank: int, size: int) -> Store:
    """Where the workers of one machine meet: a file in a folder of their own."""
    return FileStore(str(folder / "rendezvous"), size)


@cache  # one server on the port of this process
def rendezvous_env() -> tuple[Store, int, int]:
    """Store, rank and size by the environment's variables, which torchrun and cluster launchers set."""
    store, rank, size = next(rendezvous("env://"))
    return PrefixStore(meeting_name(store, rank, size), store), rank, size


def meeting_name(store: Store, rank: int, size: int) -> str:
    """A name that the workers of a run have in common, and none before them in the same store.

    Workers that torchrun starts again may find what those before them have left there, and who restarts which of
    them is known to no one: so the first of them answers every greeting until all others have come.

    Raises:
        PeerLost: if some do not come in time.
    """
    own, others = uuid4().hex, range(1, size)
    if rank > 0:
        store.set(f"greeting/{rank}", own)
        wait_until(lambda: store.check([f"answer/{own}"]), lambda: f"not all of {size}")
        name = store.get(f"answer/{own}").decode()
        store.set(f"came/{name}/{rank}", "")
        return name

    def have_come() -> bool:
        missing = [other for other in others if not store.check([f"came/{own}/{other}"])]
        for other in missing:
            if store.check([f"greeting/{other}"]):
                store.set(f"answer/{store.get(f'greeting/{other}').decode()}", own)
        return not missing

    wait_until(have_come, lambda: f"not all of {size}")
    return own


def gloo(store: Store, rank: int, size: int, name: str, local: bool) -> Group:
    """A group of processes that all call this with the same name.

    Args:
        local: all on this machine: nothing is then open to the network.

    Raises:
        PeerLost: if some do not come in time.
    """
    store = PrefixStore(name, store)
    _meet(store, size)
    with noticing():
        if local:
            return loopback_gloo(store, rank, size, ANSWER)
        # On the interface of the host's name, or those of GLOO_SOCKET_IFNAME.
        return dist.ProcessGroupGloo(store, rank, size, timeout=ANSWER)


def _meet(store: Store, size: int) -> None:
    """Until all have come: gloo itself would wait deaf to signals."""
    store.add("here", 1)
    wait_until(lambda: store.add("here", 0) >= size, lambda: f"only {store.add('here', 0)} of {size}")


def wait_until(condition: Callable[[], bool], who: Callable[[], str]) -> None:
    """Look again and again, open to signals.

    Raises:
        PeerLost: if it takes too long, with the workers that have come.
    """
    deadline = monotonic() + MEET_S
    while not condition():
        if monotonic() > deadline:
            raise PeerLost(f"{who()} workers came within {MEET_S:g} s")
        sleep(0.01)


@contextmanager
def noticing() -> Iterator[None]:
    """Whatever gloo complains of, a lost connection is at the bottom."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost("a worker has gone") from error


def hang_up(group: Group) -> None:
    """End whatever is under way in a group: a transfer that takes too long makes gloo close the connection."""
    for peer in range(group.size()):
        if peer != group.rank():
            with suppress(RuntimeError):
                group.recv([torch.empty(1)], peer, 1).wait(timedelta(milliseconds=1))


class Member(Waits):
    """A member of a gloo group, in which all carry out the same operations in the same order.

    Args:
        store, rank, size: see `rendezvous_file` and `rendezvous_env`.
        name: of this meeting in the store: another one for every run.
        local: whether all workers are on this machine.
        waiting: entered while this worker waits for others.

    Attributes:
        longest_pause_s: between two looks whether an operation is done.
    """

    longest_pause_s = 1e-3

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        name: str = "peers",
        local: bool = True,
        waiting: Waiting = nullcontext,
    ) -> None:
        self.rank, self.size, self.waiting = rank, size, waiting
        self._under_way: list[Work] = []
        with self.blocked():
            self._group = gloo(store, rank, size, name, local)

    def close(self) -> None:
        """Leave."""
        if not all(work.is_completed() for work in self._under_way):
            hang_up(self._group)
        self._group = None

    def start(self, operation: str, *arguments: Any) -> Work:
        """Begin a collective operation."""
        with noticing():
            work = getattr(self._group, operation)(*arguments)
        self._under_way = [*(work for work in self._under_way if not work.is_completed()), work]
        return work

    def finish(self, work: Work) -> None:
        """Wait for a collective operation, but not as gloo does: deaf to signals."""
        if not work.is_completed():
            with self.blocked():
                pause_s = 50e-6
                while not work.is_completed():
                    sleep(pause_s)
                    pause_s = min(1.5 * pause_s, self.longest_pause_s)
        with noticing():
            work.wait()


class GroupPending(Pending):
    """The result of a reduction."""

    def __init__(self, member: Member, work: Work, values: Tensor) -> None:
        self._member, self._work, self._values = member, work, values

    def ready(self) -> bool:
        return self._work.is_completed()

    def result(self) -> list[float]:
        self._member.finish(self._work)
        return self._values.tolist()


class GroupReplicas(Member, Replicas):
    """Workers that hold the same stages, in a gloo group of their own; other arguments as in `Member`."""

    longest_pause_s = 1e-4  # in every batch

    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        return partial(self.finish, self.start("allreduce", [values]))


class GroupPeers(Member, Peers):
    """Workers in a gloo group; arguments as in `Member`.

    Attributes:
        gate: where they end together when a signal comes; None for workers on several machines.
    """

    gate: Gate | None = None

    @override
    def total(self, values: Sequence[float]) -> Pending:
        sums = torch.tensor(values, dtype=torch.float64)
        return GroupPending(self, self.start("allreduce", [sums]), sums)

    @override
    def gather(self, value: Any) -> list[Any]:
        message = as_bytes(packed(value))
        sizes = self._sizes(message)
        here = sizes if self.rank == 0 else [0] * self.size
        messages = torch.empty(sum(here), dtype=torch.uint8)
        there = [len(message)] + [0] * (self.size - 1)
        self._do("alltoall_base", messages, message, here, there)
        return [unpacked(io.BytesIO(part.numpy())) for part in messages.split(here) if self.rank == 0]

    @override
    def share(self, value: Any) -> list[Any]:
        message = as_bytes(packed(value))
        sizes = self._sizes(message)
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(message)] = message
        messages = torch.empty(self.size, max(sizes), dtype=torch.uint8)
        self._do("_allgather_base", messages.flatten(), padded)
        return [unpacked(io.BytesIO(row[:n].numpy())) for row, n in zip(messages, sizes, strict=True)]

    def _sizes(self, message: Tensor) -> list[int]:
        """Of all workers' messages."""
        sizes = torch.empty(self.size, dtype=torch.int64)
        self._do("_allgather_base", sizes, torch.tensor([len(message)]))
        return sizes.tolist()

    @override
    def broadcast(self, value: Any, source: int = 0) -> Any:
        own = self.rank == source
        message = packed(value) if own else io.BytesIO()
        size = torch.tensor([len(message.getbuffer())])
        self._do("broadcast", size, source)
        if not own:
            message.seek(int(size) - 1)
            message.write(b"\0")
        self._do("broadcast", as_bytes(message), source)
        return value if own else unpacked(message)

    @override
    def barrier(self) -> None:
        self._do("barrier")

    @override
    def stops(self, point: int, signum: int | None) -> int | None:
        return None if self.gate is None else self.gate.stops(point, signum, self.blocked)

    def _do(self, operation: str, *arguments: Any) -> None:
        self.finish(self.start(operation, *arguments))


def packed(value: Any) -> io.BytesIO:
    """A value as bytes."""
    message = io.BytesIO()
    torch.save(value, message)
    return message


def unpacked(message: io.BytesIO) -> Any:
    """The value, with tensors on the CPU."""
    message.seek(0)
    return torch.load(message, map_location="cpu", weights_only=False)


def as_bytes(message: io.BytesIO) -> Tensor:
    """A message's memory as a tensor."""
    return torch.frombuffer(message.getbuffer(), dtype=torch.uint8)


class GlooLine(Line):
    """One direction, with a gloo group of two for itself."""

    def __init__(self, group: Group) -> None:
        self._group, self._other = group, 1 - group.rank()

    @override
    def put(self, data: Tensor) -> None:
        with noticing():
            self._group.send([data], self._other, 0).wait()

    @override
    def get(self, data: Tensor) -> None:
        with noticing():
            self._group.recv([data], self._other, 0).wait()

    @override
    def hang_up(self) -> None:
        hang_up(self._group)


class GroupSender(StagedSender):
    """To a worker that shares no memory with this one; ``group``: of the two, for this alone; others: `Staged`."""

    def __init__(self, group: Group, *args: Any, **kwargs: Any) -> None:
        super().__init__(GlooLine(group), *args, **kwargs)


class GroupReceiver(StagedReceiver):
    """From a worker that shares no memory with this one; ``group``: as above; others: `StagedReceiver`."""

    def __init__(self, group: Group, *args: Any, **kwargs: Any) -> None:
        super().__init__(GlooLine(group), *args, **kwargs)


class NcclReplicas(Replicas):
    """Workers that hold the same stages, with a GPU each; the CPU waits for nothing. ``group``: see `nccl`."""

    def __init__(self, group: Group) -> None:
        self._group, self.rank, self.size = group, group.rank(), group.size()

    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        return self._group.allreduce([values]).wait

    def close(self) -> None:
        self._group = None


def nccl(store: Store, rank: int, name: str, size: int = 2) -> Group:
    """A group of processes with a GPU each: of two for one direction of a boundary, of all replicas of a stage."""
    store = PrefixStore(name, store)
    _meet(store, size)
    return make_nccl(store, rank, size, ANSWER)


def flat(tensor: Tensor) -> Tensor:
    """The memory of a tensor that fills it, in the order in which it lies there."""
    return tensor.as_strided((tensor.numel(),), (1,))


class NcclSender(Sender):
    """From GPU to GPU; the CPU waits for nothing.

    Args:
        group: see `nccl`.
        memory_format: of images, the same at both ends.
        slots: how many tensors may be on their way before what is computed next waits for the oldest.
    """

    def __init__(
        self, group: Group, memory_format: torch.memory_format = torch.contiguous_format, slots: int = 4
    ) -> None:
        self._group, self._other, self._format, self._limit = group, 1 - group.rank(), memory_format, slots
        self._under_way: deque[tuple[Work, Tensor]] = deque()

    @override
    def send(self, tensor: Tensor) -> None:
        tensor = tensor.detach().contiguous(memory_format=format_of(tensor.shape, self._format))
        self._under_way.append((self._group.send([flat(tensor)], self._other, 0), tensor))
        if len(self._under_way) > self._limit:
            self._under_way.popleft()[0].wait()


class NcclReceiver(Receiver):
    """From GPU to GPU; what is sent must be of the shape that is expected.

    Args:
        group, memory_format: see `NcclSender`.
        device, dtype: of what comes.
    """

    def __init__(
        self,
        group: Group,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._group, self._other, self._format = group, 1 - group.rank(), memory_format
        self._kind: dict[str, Any] = {"device": device, "dtype": dtype}

    @override
    def receive(self, shape: Sequence[int]) -> Tensor:
        tensor = torch.empty(shape, **self._kind, memory_format=format_of(shape, self._format))
        self._group.recv([flat(tensor)], self._other, 0).wait()
        return tensor


def format_of(shape: Sequence[int], memory_format: torch.memory_format) -> torch.memory_format:
    """Only images have another than the usual one."""
    return memory_format if len(shape) == 4 else torch.contiguous_format
