"""How workers meet, and the channels between their stages: by shared memory, gloo or NCCL, whichever is there."""

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

# Numbers the meetings of this process: the same on all workers, since all hold the same ones.
_meetings = count()


@dataclass(frozen=True)
class Meeting:
    """Where the workers of a run meet.

    Attributes:
        store, rank, size: see `remote.rendezvous_file` and `remote.rendezvous_env`.
        name: of this meeting, another one for every run.
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
        """Some workers, among them this one, as peers."""
        waiting = waiting_for("the other workers")
        return remote.GroupPeers(*self.group(workers, name), self.local, waiting)

    def replicas(self, workers: Sequence[int], nccl: bool) -> Replicas:
        """The workers that hold the same stages as this one; ``nccl``: whether each has a GPU of its own."""
        if len(workers) == 1:
            return Replicas()
        group, waiting = self.group(workers, "replicas"), waiting_for("its replicas")
        if nccl:
            store, rank, size, name = group
            return remote.NcclReplicas(remote.nccl(store, rank, name, size))
        return remote.GroupReplicas(*group, self.local, waiting)

    def group(self, workers: Sequence[int], name: str) -> tuple[Store, int, int, str]:
        """Store, rank, size and name of a group of workers."""
        ranks = "-".join(map(str, workers))
        return self.store, workers.index(self.rank), len(workers), f"{self.name}/{name}/{ranks}"

    def pair(self, other: int, name: str) -> tuple[Store, int, int, str]:
        """`group` of this worker and another one."""
        return self.group(sorted((self.rank, other)), name)


def meet(purpose: str) -> Meeting | None:
    """Where to meet the other workers that were started with this one, here or by torchrun; None for one alone."""
    name = f"{purpose}-{next(_meetings)}"
    if (worker := current()) is not None:
        store = remote.rendezvous_file(worker.folder, worker.rank, worker.size)
        return Meeting(store, worker.rank, worker.size, name, True)
    if torch.distributed.is_torchelastic_launched():
        local = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
        return Meeting(*remote.rendezvous_env(), name, local)
    return None


def waiting_for(what: str) -> Callable[[], AbstractContextManager[Any]]:
    """What a worker enters while it waits for another one, so that its supervisor knows what it waits for."""
    worker = current()
    return nullcontext if worker is None else partial(worker.status.waiting, what)


class Ends(ABC):
    """Makes this worker's ends of the channels to another one, which calls the same in the same order.

    Attributes:
        other: that worker.
    """

    other: int

    @abstractmethod
    def sender(self, name: str) -> Channel:
        """The end that sends; ``name`` says what it sends, such as ``the state behind stage 1``."""

    @abstractmethod
    def receiver(self, name: str) -> Channel:
        """The end that receives; ``name`` as for `sender`."""

    def peer_arguments(self, name: str) -> dict[str, Any]:
        """A channel's arguments: the other worker's name for messages, and what a worker that waits is waiting for."""
        return {
            "peer": f"worker {self.other}",
            "waiting": waiting_for(f"{name}, with worker {self.other}"),
        }


@dataclass
class SharedEnds(Ends):
    """Through memory that two processes of one machine share; ``folder`` is where their sockets meet."""

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
    """Through sockets, and the host's memory for tensors on CUDA."""

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
    """From GPU to GPU."""

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
    """Refuse a module that would have more tensors on their way between two workers than any channel holds.

    All kinds of channels have the limit of the one that has one, so that a placement does not decide.

    Raises:
        UserError: if it would; the text names the key and the largest value.
    """
    needed, most = module.in_flight, shared.MAX_SLOTS
    if needed <= most:
        return
    plans: Sequence[Plan] = getattr(module, "plans", [module.plan])  # of all levels, where there are some
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
    """The stages of this worker, one of the ``groups``, and their channels; ``ends``: of those to another group."""
    own = groups[group]
    placement = Placement(own, {}, {}, peers, pipeline, replicas, statistics)
    for i in own[:-1]:
        placement.states[i], placement.gradients[i] = LocalChannel(), LocalChannel()
    if group > 0:
        above, i = ends(group - 1), own.start - 1
        placement.states[i] = above.receiver(f"the state behind stage {i}")
        placement.gradients[i] = above.sender(f"the gradient behind stage {i}")
    if group + 1 < len(groups):
        below, i = ends(group + 1), own.stop - 1
        placement.states[i] = below.sender(f"the state behind stage {i}")
        placement.gradients[i] = below.receiver(f"the gradient behind stage {i}")
    return placement


def meeting_folders(peers: Peers, node: int, folder: str) -> list[Path | None]:
    """For each worker its folder, if it is on this machine."""
    nodes_and_folders = peers.share((node, folder))
    return [Path(path) if where == node else None for where, path in nodes_and_folders]
