"""The Lightning Strategy that trains the stages of a network on several workers, each with a device of its own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.seed import reset_seed
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.trainer.states import TrainerFn, TrainerState
from torch import Tensor
from typing_extensions import override

from sglight.compat.lightning import Launcher, set_rank
from sglight.config.machine import cores
from sglight.config.replicas import check_divides
from sglight.errors import UserError
from sglight.link import Alone, Peers, Replicas
from sglight.parallel.environment import environment
from sglight.parallel.gate import Gate
from sglight.parallel.launcher import current, launch
from sglight.parallel.reduction import reduction
from sglight.parallel.seats import Seat, seat_name, seats
from sglight.parallel.wiring import (
    Ends,
    GlooEnds,
    Meeting,
    NcclEnds,
    SharedEnds,
    check_room,
    meet,
    meeting_folders,
    wire,
)
from sglight.strategies import flight
from sglight.strategies.staged import StagedModule

# Parts of a checkpoint with an entry for each stage or estimator: each worker has those of its own stages.
BY_STAGE = ("state_dict", "optimizer_states", "lr_schedulers", "in_flight", "waiting")


class StageStrategy(ParallelStrategy):
    """Trains a `StagedModule` whose stages are in several processes, the workers.

    Each worker builds only its own stages, which are consecutive. There may be several replicas of each stage, at
    different workers. All workers get the same batches, and each replica takes its part of a batch.

    Workers on one machine are started here; torchrun can start workers on several machines. On the CPU neighbours
    exchange tensors through shared memory, or by gloo if they are on different machines. On CUDA they use NCCL, or
    gloo if they share a device.

    >>> trainer = pl.Trainer(strategy=StageStrategy(), devices=2, accelerator="cpu")  # doctest: +SKIP
    >>> trainer.fit(DNI(network, optimizer, stages=4), datamodule)  # doctest: +SKIP

    Args:
        threads: the number of CPU threads of each worker that is started here; None for its share of the cores.
        share_memory: whether neighbours may share memory.
        idle_timeout_s: ends the run if a worker that is started here does nothing for so many seconds, though it waits
            for no other worker.
        workers: the number of workers on this machine, if it is not that of devices, which they then share.
        replicas: the number of replicas of each stage.
        layout: which workers have neighbouring ranks: ``pipelines``: those of a replica, ``replicas``: of a stage.
        sync_batchnorm: whether batch normalisation uses the samples of all replicas.
    """

    strategy_name = "stages"

    def __init__(
        self,
        threads: int | None = None,
        share_memory: bool = True,
        idle_timeout_s: float = 10.0,
        workers: int | None = None,
        replicas: int = 1,
        layout: str = "pipelines",
        sync_batchnorm: bool = False,
    ) -> None:
        super().__init__(cluster_environment=environment())
        self.threads = threads
        self.share_memory = share_memory
        self.idle_timeout_s = idle_timeout_s
        self.workers = workers
        self.replicas, self.layout, self.sync_batchnorm = replicas, layout, sync_batchnorm
        self.num_nodes = 1
        self.peers: Peers = Alone()
        # The parameters of all stages; set at the end, at worker 0, for the process that has started the workers.
        self.final_state: dict[str, Any] = {}
        self._failed = False

    @property
    def num_processes(self) -> int:
        """The number of workers on this machine."""
        return self.workers or len(self.parallel_devices or ())

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank % len(self.parallel_devices)]

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Every worker gets every batch.
        return {"num_replicas": 1, "rank": 0}

    @override
    def _configure_launcher(self) -> None:
        if environment() is None and self.num_processes > 1:
            _check_not_interactive(self.num_processes)
            self._launcher = StageLauncher(self)

    def set_world_ranks(self) -> None:
        """Tell Lightning which worker this is."""
        set_rank(self.global_rank)

    @override
    def setup_environment(self) -> None:
        self.cluster_environment = environment() or self.cluster_environment
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        self._connect(*self.assign(self.world_size))

    def assign(self, workers: int) -> tuple[StagedModule, list[range]]:
        """The module, and its groups of stages for a number of workers.

        Raises:
            UserError: if it cannot be trained by so many.
        """
        module = self.lightning_module
        if not isinstance(module, StagedModule):
            raise UserError(f"StageStrategy trains modules that have stages, not {type(module).__name__}")
        try:
            check_divides(self.replicas, workers)
            module.check_replicas(self.replicas)
            groups = module.groups(workers // self.replicas)
        except ValueError as error:
            raise UserError(str(error)) from error
        if len(groups) > 1:
            check_room(module)
        return module, groups

    def _connect(self, module: StagedModule, groups: list[range]) -> None:
        """Connect to the other workers, and give the module its stages and its channels."""
        meeting = meet("run")
        if meeting is None:
            return
        table = seats(len(groups), self.replicas, self.layout)
        seat = table[meeting.rank]
        if (worker := current()) is not None:
            worker.status.set_name(seat_name(groups[seat.group], seat, self.replicas, module.part))
        self.peers = peers = meeting.peers()
        line = [table.index(Seat(group, seat.replica)) for group in range(len(groups))]
        same = [table.index(Seat(seat.group, replica)) for replica in range(self.replicas)]
        pipeline = peers if self.replicas == 1 else meeting.peers_among(line, "pipeline")
        replicas = meeting.replicas(same, nccl=self.root_device.type == "cuda" and not self._shares_devices)
        with tempfile.TemporaryDirectory(prefix="sglight-") as folder:
            folders = meeting_folders(peers, self.node_rank, folder)
            if (first := folders[0]) is not None and None not in folders:
                peers.gate = Gate(first / "gate", peers.rank, peers.size)

            def ends(group: int) -> Ends:
                return self._ends(module, meeting, folders, line[group])

            statistics = replicas if self.sync_batchnorm and module.spec.has_statistics else Replicas()
            module.place(wire(groups, seat.group, ends, peers, pipeline, replicas, statistics))
            self.peers.barrier()  # after it no worker needs the folder

    @property
    def _shares_devices(self) -> bool:
        """Whether several workers use the same device."""
        return self.num_processes > len(self.parallel_devices or ())

    def _ends(self, module: StagedModule, meeting: Meeting, folders: list[Path | None], other: int) -> Ends:
        """The ends of the fastest kind of channel to another worker."""
        device, slots = self.root_device, module.in_flight
        if device.type == "cuda":
            if self._shares_devices:
                return GlooEnds(meeting, other, device, slots)
            layout = torch.channels_last if module.spec.kernel == "conv" else torch.contiguous_format
            dtype = torch.float64 if self.precision_plugin.precision == "64-true" else torch.float32
            return NcclEnds(meeting, other, device, slots, dtype, layout)
        folder = folders[min(meeting.rank, other)]
        if self.share_memory and sys.platform == "linux" and folder and folders[max(meeting.rank, other)]:
            return SharedEnds(meeting.rank, other, folder, slots)
        return GlooEnds(meeting, other, device, slots)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._set_doing(f"batch {batch_idx}")

    @override
    def on_train_end(self) -> None:
        self._set_doing("the end of the training")

    @override
    def on_validation_start(self) -> None:
        self._set_doing("a validation")

    @override
    def on_test_start(self) -> None:
        self._set_doing("the test")

    def _set_doing(self, doing: str) -> None:
        """Set what this worker does at present, for the message if it fails."""
        if (worker := current()) is not None:
            worker.status.set_doing(doing)

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @override
    def barrier(self, name: str | None = None) -> None:
        self.peers.barrier()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return self.peers.broadcast(obj, src)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        return torch.stack(self.peers.share(tensor.detach())).to(tensor.device)

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """The sum, mean, ... over all workers of a tensor of a few numbers, see `reduction`.

        Anything but a tensor is returned unchanged.
        """
        reduce = reduction(reduce_op)
        return reduce(self.all_gather(tensor)) if isinstance(tensor, Tensor) else tensor

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        replica = self._replica
        # Replicas are equal, and the first one's are saved; but each has its own part of the pieces in the pipeline.
        keys = BY_STAGE if replica == 0 else ("in_flight",)
        in_flight: list[dict[str, Any]] = [{} for _ in range(self.replicas)]
        for number, part in self.peers.gather((replica, {k: checkpoint[k] for k in keys if k in checkpoint})):
            in_flight[number] |= part.pop("in_flight", {})
            for key, values in part.items():
                checkpoint[key] = {**checkpoint[key], **values}
        if self.is_global_zero:
            checkpoint["in_flight"] = flight.joined(in_flight)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def on_exception(self, exception: BaseException) -> None:
        # Other workers may have ended, so nothing must wait for them from here on.
        self._failed = True

    @override
    def teardown(self) -> None:
        if isinstance(self.lightning_module, StagedModule):
            self._disconnect(self.lightning_module)
        super().teardown()

    def _disconnect(self, module: StagedModule) -> None:
        if self._launcher is not None and not self._failed:
            for part in self.peers.gather(module.state_dict() if self._replica == 0 else {}):
                self.final_state |= part
        placement = module.placement
        for channel in placement.channels:
            channel.close()
        for peers in {placement.peers, placement.pipeline}:
            peers.close()
        placement.replicas.close()
        self.peers = Alone()

    @property
    def _replica(self) -> int:
        """The number of this worker's replica of its stages."""
        module = self.lightning_module
        return module.placement.replicas.rank if isinstance(module, StagedModule) else 0


def _check_not_interactive(workers: int) -> None:
    """Refuse workers in a notebook or an interactive shell, whose code they could not import."""
    if hasattr(sys, "ps1") or sys.flags.interactive:
        raise UserError(
            f"devices={workers} starts workers, which import what they train from files, and a notebook or an "
            "interactive shell is none: save the code as a script and run that, use `!python -m sglight "
            f"trainer.devices={workers} ...` here, or train in one process with devices=1"
        )


@dataclass
class Outcome:
    """What worker 0 returns to the process that has started it: the result of the Trainer, and the state of it all."""

    result: Any
    state: TrainerState
    state_dict: dict[str, Any]
    progress: dict[str, Any]
    callback_metrics: dict[str, Any]
    callback_states: dict[str, Any]
    fit_loop: dict[str, Any]


class StageLauncher(Launcher):
    """Runs a function of the Trainer in worker processes, and copies the results into the calling process.

    The module there gets the parameters of all stages, the Trainer the metrics and progress, the callbacks their
    states.
    """

    def __init__(self, strategy: StageStrategy) -> None:
        self._strategy = strategy

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        # Workers could not import what is defined in a notebook.
        return False

    @override
    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any
    ) -> Any:
        s = self._strategy
        workers = s.num_processes
        threads = s.threads or max(cores() // workers, 1)
        if trainer is None:
            return launch(
                function, *args, workers=workers, threads=threads, idle_timeout_s=s.idle_timeout_s, **kwargs
            )
        s.assign(workers)  # refuses what cannot be trained before workers start
        outcome: Outcome = launch(
            _in_worker, trainer, function, args, kwargs,
            workers=workers, threads=threads, idle_timeout_s=s.idle_timeout_s,
        )  # fmt: skip
        _take_over(trainer, outcome)
        return outcome.result

    @override
    def kill(self, signum: int) -> None:
        """Does nothing, because all workers have ended when `launch` returns."""


def _in_worker(
    trainer: pl.Trainer, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Outcome | None:
    result = function(*args, **kwargs)
    strategy: StageStrategy = trainer.strategy  # type: ignore[assignment]
    if not strategy.is_global_zero:
        return None
    return Outcome(
        result,
        trainer.state,
        strategy.final_state,
        trainer.lightning_module.progress(),  # type: ignore[operator]
        {name: value.cpu() for name, value in trainer.callback_metrics.items()},
        {callback.state_key: callback.state_dict() for callback in trainer.callbacks},  # type: ignore[attr-defined]
        trainer.fit_loop.state_dict(),
    )


def _take_over(trainer: pl.Trainer, outcome: Outcome) -> None:
    trainer.state = outcome.state
    trainer.callback_metrics.update(outcome.callback_metrics)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if state := outcome.callback_states.get(callback.state_key):
            callback.load_state_dict(state)
    if outcome.state.fn == TrainerFn.FITTING:
        trainer.fit_loop.load_state_dict(outcome.fit_loop)
    module = trainer.lightning_module
    assert isinstance(module, StagedModule)
    module.configure_model()
    module.restore_progress(outcome.progress)
    module.load_state_dict(outcome.state_dict)
