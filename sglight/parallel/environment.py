"""The rank of this process and the number of workers, whether they were started here or by torchrun."""

from __future__ import annotations

from typing import Any

from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from typing_extensions import override

from sglight.parallel.launcher import Worker, current
from sglight.parallel.wiring import meet


class WorkerEnvironment(ClusterEnvironment):
    """Lightning's environment for a worker that `launcher.launch` has started."""

    def __init__(self, worker: Worker) -> None:
        self._rank, self._size = worker.rank, worker.size

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 0  # not used

    @staticmethod
    @override
    def detect() -> bool:
        return current() is not None

    @override
    def world_size(self) -> int:
        return self._size

    @override
    def set_world_size(self, size: int) -> None: ...

    @override
    def global_rank(self) -> int:
        return self._rank

    @override
    def set_global_rank(self, rank: int) -> None: ...

    @override
    def local_rank(self) -> int:
        return self._rank

    @override
    def node_rank(self) -> int:
        return 0


def environment() -> ClusterEnvironment | None:
    """Lightning's environment for this process; None if it is the only worker."""
    if (worker := current()) is not None:
        return WorkerEnvironment(worker)
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else None


def agree(value: Any) -> Any:
    """The value of worker 0, for workers started by torchrun, each of which has composed the config by itself."""
    if current() is not None or (meeting := meet("agree")) is None:
        return value
    peers = meeting.peers()
    value = peers.broadcast(value)
    peers.close()
    return value
