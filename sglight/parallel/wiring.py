"""Connects workers, and constructs the channels between their stages: by shared memory, gloo or NCCL."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store  # type: ignore[attr-defined]
from typing_extensions import override

from sglight.errors import UserError
from sglight.link import Channel, LocalChannel, Peers, Placement, Replicas
from sglight.parallel import remote, shared
from sglight.parallel.launcher import current
from sglight.strategies.plan import Plan
from sglight.strategies.schedule import Decoupled
from sglight.strategies.staged import StagedModule

# Numbers the meetings of this process. All workers have the same meetings, so the numbers agree.
_meetings = count()


@dataclass(frozen=True)
class Meeting:
    """What the workers of a run need to connect to each other.

    Attributes:
        store: see `remote.rendezvous_file` and `remote.rendezvous_env`.
        rank: of this worker.
        size: the number of workers.
        name: of this meeting, a new one for each run.
        local: whether all workers are on this machine.
    """

    store: Store
    rank: int
    size: int
    name: str
    local: bool

    def peers(self) -> remote.GroupPeers:
        """All workers."""
        return self.peers_among(range(self.size), "peers")

    def peers_among(self, workers: Sequence[int], name: str) -> remote.GroupPeers:
        """Some of the workers, this one among them, as peers."""
        waiting = waiting_for("the other workers")
        return remote.GroupPeers(*self.group(workers, name), self.local, waiting)

    def replicas(self, workers: Sequence[int], nccl: bool) -> Replicas:
        """The workers with the same stages as this one.

        Args:
            workers: their ranks.
            nccl: whether to use NCCL, which needs a GPU for each worker.
        """
        if len(workers) == 1:
            return Replicas()
        group, waiting = self.group(workers, "replicas"), waiting_for("its replicas")
        if nccl:
            store, rank, size, name = group
            return remote.NcclReplicas(remote.nccl(store, rank, name, size))
        return remote.GroupReplicas(*group, self.local, waiting)

    def group(self, workers: Sequence[int], name: str) -> tuple[Store, int, int, str]:
        """Store, rank, size and name for a process group of some workers."""
        ranks = "-".join(map(str, workers))
        return self.store, workers.index(self.rank), len(workers), f"{self.name}/{name}/{ranks}"

    def pair(self, other: int, name: str) -> tuple[Store, int, int, str]:
        """`group` of this worker and another one."""
        return self.group(sorted((self.rank, other)), name)


def meet(purpose: str) -> Meeting | None:
    """The meeting with the workers that were started with this one; None if it is alone.

    Args:
        purpose: a name for it, the same at all workers.
    """
    name = f"{purpose}-{next(_meetings)}"
    if (worker := current()) is not None:
        store = remote.rendezvous_file(worker.folder, worker.rank, worker.size)
        return Meeting(store, worker.rank, worker.size, name, True)
    if torch.distributed.is_torchelastic_launched():
        local = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
        return Meeting(*remote.rendezvous_env(), name, local)
    return None


def waiting_for(what: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context manager to enter while this worker waits for another one: it tells its supervisor what for."""
    worker = current()
    return nullcontext if worker is None else partial(worker.status.waiting, what)


class Ends(ABC):
    """Constructs this worker's ends of the channels to another worker, which must call the same in the same order.

    Attributes:
        other: the rank of that worker.
    """

    other: int

    @abstractmethod
    def sender(self, name: str) -> Channel:
        """The sending end of a channel; ``name`` says what it carries, such as ``the state after stage 1``."""

    @abstractmethod
    def receiver(self, name: str) -> Channel:
        """The receiving end of a channel; ``name`` as for `sender`."""

    def peer_arguments(self, name: str) -> dict[str, Any]:
        """Arguments of all channels: the name of the other worker, and a context manager to enter while waiting."""
        return {
            "peer": f"worker {self.other}",
            "waiting": waiting_for(f"{name}, with worker {self.other}"),
        }


@dataclass
class SharedEnds(Ends):
    """Ends of channels through memory that two processes of one machine share.

    Attributes:
        rank: of this worker.
        other: the rank of the other worker.
        folder: for the sockets by which they connect.
        slots: the number of tensors that a channel holds.
    """

    rank: int
    other: int
    folder: Path
    slots: int

    @override
    def sender(self, name: str) -> Channel:
        return shared.SharedSender(self._connect(name), self.slots, **self.peer_arguments(name))

    @override
    def receiver(self, name: str) -> Channel:
        return shared.SharedReceiver(self._connect(name), **self.peer_arguments(name))

    def _connect(self, name: str) -> Any:
        return shared.connect(self.folder, name.replace(" ", "-"), listen=self.rank < self.other)


@dataclass
class GlooEnds(Ends):
    """Ends of channels by gloo; tensors on CUDA are copied to the memory of the host for that."""

    meeting: Meeting
    other: int
    device: torch.device
    slots: int

    @override
    def sender(self, name: str) -> Channel:
        return remote.GroupSender(self._group(name), self.slots, **self.peer_arguments(name))

    @override
    def receiver(self, name: str) -> Channel:
        return remote.GroupReceiver(self._group(name), self.slots, self.device, **self.peer_arguments(name))

    def _group(self, name: str) -> Any:
        return remote.gloo(*self.meeting.pair(self.other, name), self.meeting.local)


@dataclass
class NcclEnds(Ends):
    """Ends of channels from GPU to GPU, by NCCL."""

    meeting: Meeting
    other: int
    device: torch.device
    slots: int
    dtype: torch.dtype
    layout: torch.memory_format

    @override
    def sender(self, name: str) -> Channel:
        return remote.NcclSender(self._group(name), self.layout, self.slots)

    @override
    def receiver(self, name: str) -> Channel:
        return remote.NcclReceiver(self._group(name), self.device, self.dtype, self.layout)

    def _group(self, name: str) -> Any:
        store, rank, _, name = self.meeting.pair(self.other, name)
        return remote.nccl(store, rank, name)


def check_room(module: StagedModule) -> None:
    """Refuse a module that needs more tensors in transfer between two workers than a channel can hold.

    Only channels of shared memory have a limit. It is applied to all kinds, so that the same settings are allowed in
    every placement.

    Raises:
        UserError: if it needs more; the text names the key and the largest value.
    """
    needed, most = module.in_flight, shared.MAX_SLOTS
    if needed <= most:
        return
    plans: Sequence[Plan] = getattr(
        module, "plans", [module.plan]
    )  # a multilevel training has one for each level
    lag = max((plan.schedule.lag for plan in plans if isinstance(plan.schedule, Decoupled)), default=0)
    if lag:
        asked, remedy = f"strategy.lag={lag}", f"set strategy.lag to {lag - (needed - most)} or less"
    else:
        asked, remedy = f"strategy.stages={module.plan.last + 1}", "lower it, or strategy.microbatches"
    raise UserError(
        f"{asked} is too much for several workers: {needed} tensors would be on their way between two of them, "
        f"and {most} is the most; {remedy}, or train in one process with trainer.devices=1"
    )


def wire(
    groups: list[range],
    group: int,
    ends: Callable[[int], Ends],
    peers: Peers,
    pipeline: Peers,
    replicas: Replicas,
    statistics: Replicas,
) -> Placement:
    """The placement of this worker: its stages, and the channels between them and to its neighbours.

    Args:
        groups: the stages of all groups.
        group: the number of this worker's group.
        ends: gives the ends of the channels to another group.
        peers: all workers.
        pipeline: those of them that hold each stage once.
        replicas: those with the same stages as this worker.
        statistics: those over whose samples batch normalisation takes its statistics.
    """
    own = groups[group]
    placement = Placement(own, {}, {}, peers, pipeline, replicas, statistics)
    for i in own[:-1]:
        placement.states[i], placement.gradients[i] = LocalChannel(), LocalChannel()
    if group > 0:
        above, i = ends(group - 1), own.start - 1
        placement.states[i] = above.receiver(f"the state after stage {i}")
        placement.gradients[i] = above.sender(f"the gradient after stage {i}")
    if group + 1 < len(groups):
        below, i = ends(group + 1), own.stop - 1
        placement.states[i] = below.sender(f"the state after stage {i}")
        placement.gradients[i] = below.receiver(f"the gradient after stage {i}")
    return placement


def meeting_folders(peers: Peers, node: int, folder: str) -> list[Path | None]:
    """The folder of each worker, and None for workers on other machines; all workers must call it.

    Args:
        peers: all workers.
        node: the number of this machine.
        folder: of this worker.
    """
    nodes_and_folders = peers.share((node, folder))
    return [Path(path) if where == node else None for where, path in nodes_and_folders]
