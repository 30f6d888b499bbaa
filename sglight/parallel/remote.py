"""Communication by torch.distributed: among all workers, and between neighbours that share no memory.

Process groups are constructed here without `init_process_group`. With that, Lightning would find the default group
and synchronise the workers in places of its own.
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

MEET_S = 120.0  # the longest time to wait until all workers have started
# The timeout of transfers: long, since a worker that computes is waited for, and one that has died is noticed anyway.
ANSWER = timedelta(days=1)


def rendezvous_file(folder: Path, rank: int, size: int) -> Store:
    """The store by which the workers of one machine find each other: a file in a folder of this run."""
    return FileStore(str(folder / "rendezvous"), size)


@cache  # it starts a server on a port, which can be done only once
def rendezvous_env() -> tuple[Store, int, int]:
    """Store, rank and size from the environment variables that torchrun and cluster launchers set."""
    store, rank, size = next(rendezvous("env://"))
    return PrefixStore(meeting_name(store, rank, size), store), rank, size


def meeting_name(store: Store, rank: int, size: int) -> str:
    """A name that the workers of a run agree on, and that no earlier workers have used in the same store.

    Workers that torchrun restarts may find keys of earlier workers in the store, and do not know which of these still
    run. So the worker with rank 0 chooses a new name, and answers each greeting of the others with it until all of
    them have taken it.

    Raises:
        PeerLost: if not all workers start in time.
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
    """A gloo group of processes, which must all call this with the same name.

    Args:
        store: by which they find each other.
        rank: of this process in the group.
        size: of the group.
        name: of the group.
        local: whether all are on this machine; then no port is open to the network.

    Raises:
        PeerLost: if not all call it in time.
    """
    store = PrefixStore(name, store)
    _meet(store, size)
    with lost_connections():
        if local:
            return loopback_gloo(store, rank, size, ANSWER)
        # gloo uses the network interface of the host's name, or that of GLOO_SOCKET_IFNAME.
        return dist.ProcessGroupGloo(store, rank, size, timeout=ANSWER)


def _meet(store: Store, size: int) -> None:
    """Wait until all processes of a group are there. gloo's own wait would not be interrupted by signals."""
    store.add("here", 1)
    wait_until(lambda: store.add("here", 0) >= size, lambda: f"only {store.add('here', 0)} of {size}")


def wait_until(condition: Callable[[], bool], who: Callable[[], str]) -> None:
    """Wait until a condition holds; signals interrupt the wait.

    Args:
        condition: is called every 10 ms.
        who: describes, for the error, the workers that are there.

    Raises:
        PeerLost: if it takes longer than `MEET_S` seconds.
    """
    deadline = monotonic() + MEET_S
    while not condition():
        if monotonic() > deadline:
            raise PeerLost(f"{who()} workers came within {MEET_S:g} s")
        sleep(0.01)


@contextmanager
def lost_connections() -> Iterator[None]:
    """Raise `PeerLost` for any error of gloo within the block, since a lost connection is the cause of all of them."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost("a worker has gone") from error


def hang_up(group: Group) -> None:
    """End all transfers of a group, by one that times out: gloo then closes the connection."""
    for peer in range(group.size()):
        if peer != group.rank():
            with suppress(RuntimeError):
                group.recv([torch.empty(1)], peer, 1).wait(timedelta(milliseconds=1))


class Member(Waits):
    """A worker in a gloo group. All members must start the same operations in the same order.

    Args:
        store: see `rendezvous_file` and `rendezvous_env`.
        rank: of this worker in the group.
        size: of the group.
        name: of the group in the store, a new one for each run.
        local: whether all workers are on this machine.
        waiting: a context manager that is entered while this worker waits for others.

    Attributes:
        longest_pause_s: the longest time between two checks whether an operation is done.
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
        """Leave the group."""
        if not all(work.is_completed() for work in self._under_way):
            hang_up(self._group)
        self._group = None

    def start(self, operation: str, *arguments: Any) -> Work:
        """Start a collective operation, without waiting for its result."""
        with lost_connections():
            work = getattr(self._group, operation)(*arguments)
        self._under_way = [*(work for work in self._under_way if not work.is_completed()), work]
        return work

    def finish(self, work: Work) -> None:
        """Wait for a collective operation. gloo's own wait would not be interrupted by signals."""
        if not work.is_completed():
            with self.blocked():
                pause_s = 50e-6
                while not work.is_completed():
                    sleep(pause_s)
                    pause_s = min(1.5 * pause_s, self.longest_pause_s)
        with lost_connections():
            work.wait()


class GroupPending(Pending):
    """The result of a reduction in a gloo group."""

    def __init__(self, member: Member, work: Work, values: Tensor) -> None:
        self._member, self._work, self._values = member, work, values

    @override
    def ready(self) -> bool:
        return self._work.is_completed()

    @override
    def result(self) -> list[float]:
        self._member.finish(self._work)
        return self._values.tolist()


class GroupReplicas(Member, Replicas):
    """The workers with the same stages as this one, in a gloo group; arguments as in `Member`."""

    longest_pause_s = 1e-4  # shorter, since it comes in every batch

    @override
    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        return partial(self.finish, self.start("allreduce", [values]))


class GroupPeers(Member, Peers):
    """All workers of a run, in a gloo group; arguments as in `Member`.

    Attributes:
        gate: by which they agree where to stop after a signal; None for workers on several machines.
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
        self._do("allgather", [list(messages)], [padded])
        return [unpacked(io.BytesIO(row[:n].numpy())) for row, n in zip(messages, sizes, strict=True)]

    def _sizes(self, message: Tensor) -> list[int]:
        """The sizes of the messages of all workers, in bytes."""
        sizes = torch.empty(self.size, 1, dtype=torch.int64)
        self._do("allgather", [list(sizes)], [torch.tensor([len(message)])])
        return sizes.flatten().tolist()

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
    """Any value as bytes."""
    message = io.BytesIO()
    torch.save(value, message)
    return message


def unpacked(message: io.BytesIO) -> Any:
    """The value of a `packed` message, with its tensors on the CPU."""
    message.seek(0)
    return torch.load(message, map_location="cpu", weights_only=False)


def as_bytes(message: io.BytesIO) -> Tensor:
    """The bytes of a message as a tensor that shares their memory."""
    return torch.frombuffer(message.getbuffer(), dtype=torch.uint8)


class GlooLine(Line):
    """One direction of a boundary, by a gloo group of two processes that is used for nothing else."""

    def __init__(self, group: Group) -> None:
        self._group, self._other = group, 1 - group.rank()

    @override
    def put(self, data: Tensor) -> None:
        with lost_connections():
            self._group.send([data], self._other, 0).wait()

    @override
    def get(self, data: Tensor) -> None:
        with lost_connections():
            self._group.recv([data], self._other, 0).wait()

    @override
    def hang_up(self) -> None:
        hang_up(self._group)


class GroupSender(StagedSender):
    """Sends to a worker that shares no memory with this one.

    Args:
        group: a gloo group of the two workers, used for nothing else.
        args: see `StagedSender`.
        kwargs: see `StagedSender`.
    """

    def __init__(self, group: Group, *args: Any, **kwargs: Any) -> None:
        super().__init__(GlooLine(group), *args, **kwargs)


class GroupReceiver(StagedReceiver):
    """Receives from a worker that shares no memory with this one.

    Args:
        group: a gloo group of the two workers, used for nothing else.
        args: see `StagedReceiver`.
        kwargs: see `StagedReceiver`.
    """

    def __init__(self, group: Group, *args: Any, **kwargs: Any) -> None:
        super().__init__(GlooLine(group), *args, **kwargs)


class NcclReplicas(Replicas):
    """The workers with the same stages as this one, each with its own GPU; only the GPU waits for sums.

    Args:
        group: see `nccl`.
    """

    def __init__(self, group: Group) -> None:
        self._group, self.rank, self.size = group, group.rank(), group.size()

    @override
    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        return self._group.allreduce([values]).wait

    @override
    def close(self) -> None:
        self._group = None


def nccl(store: Store, rank: int, name: str, size: int = 2) -> Group:
    """An NCCL group of processes, each with its own GPU.

    It is used for one direction of a boundary, between two workers, or for all replicas of a stage.
    """
    store = PrefixStore(name, store)
    _meet(store, size)
    return make_nccl(store, rank, size, ANSWER)


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor as a vector, in the order of its memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


class NcclSender(Sender):
    """Sends tensors from GPU to GPU, without a wait of the CPU.

    Args:
        group: see `nccl`.
        memory_format: of images, the same at both ends.
        slots: the number of tensors that may be in transfer before the GPU waits for the oldest.
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
    """Receives tensors from GPU to GPU; they must have the shape that is expected.

    Args:
        group: see `nccl`.
        device: of the tensors.
        dtype: of the tensors.
        memory_format: of images, the same at both ends.
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
    """The memory format of a tensor: ``memory_format`` for images, which have four dimensions, else contiguous."""
    return memory_format if len(shape) == 4 else torch.contiguous_format
