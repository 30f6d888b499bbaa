"""What all strategies share: building stages, a stage's descent, evaluation, optimisers and logging."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightning_fabric.utilities.data import sized_len
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from sglight.link import Placement, alone
from sglight.networks import NetworkSpec, Stage
from sglight.networks.network import ExtraCost, balanced
from sglight.networks.regularisers import penalty
from sglight.strategies.curves import Curves
from sglight.strategies.grid import schedule_grid
from sglight.strategies.optim import make_optimizer, make_scheduler
from sglight.strategies.recorder import Recorder
from sglight.strategies.schedule import StageTimes

# Inputs and labels; inputs are None where the first stage does not live.
Batch = tuple[Tensor | None, Tensor]

# Of so many batches the phases of the first are timed.
TIMED_EVERY = 5

# Fields of a network that may change between a checkpoint and its resumption: they shape no parameter and no state.
FREE = ("seed", "reversible", "init", "init_scale")


class StagedModule(pl.LightningModule):
    """A network in one or more stages, trained with manual optimisation.

    Gradients are those of the summed loss on their way through the network, and divided by the batch size where
    they meet the parameters: the mean loss is minimised, and what crosses a boundary does not depend on the
    batch size.

    The stages may live in several processes: `place` says which are here. All processes see the same batches in the
    same order, and what is learnt does not depend on the placement.

    Callbacks see ``on_before_optimizer_step`` once a batch, for the first stage here, and no ``on_after_backward``.

    Args:
        network: the fields of `NetworkSpec`, as plain containers.
        optimizer, scheduler: see `optim.py`; every stage has its own.
        clip_norm: largest norm of a stage's gradient; None for no limit.
        regularisation: weights of the penalties in `sglight.networks.regularisers.penalty`.
        stages: M.

    Attributes:
        part: what the parts are called that workers share out.
        inputs_everywhere: whether all workers need the inputs, not only that of the first stage.
    """

    # How often the network has been refined: results before and after do not compare.
    level = 0
    part = "stage"
    inputs_everywhere = False

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        clip_norm: float | None = None,
        regularisation: Mapping[str, float] | None = None,
        stages: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.spec = NetworkSpec(**network)
        self.optimizer_config = dict(optimizer)
        self.scheduler_config = dict(scheduler or {"name": "none"})
        self.clip_norm = clip_norm
        self.regularisation = dict(regularisation or {})
        self.cuts = self.make_cuts(stages)
        self.stages = nn.ModuleDict()
        self.placement = alone(stages)
        self.recorder = Recorder()
        self.curves = Curves()
        self._sums: Tensor | None = None
        self._seen = 0
        self._evaluated: list[Tensor] = []
        self._evaluated_samples = 0

    def extra_cost(self) -> ExtraCost:
        """What a stage spends besides its own forward pass, for the balance of the cuts."""
        return 0.0

    def make_cuts(self, stages: int) -> list[int]:
        """Where the network is cut; see `NetworkSpec.cuts`."""
        return self.spec.cuts(stages, self.extra_cost())

    @property
    def is_finest(self) -> bool:
        """Whether the network has the depth that was asked for, and will not be refined."""
        return True

    def describe(self) -> str:
        """The strategy in a line, for the summary of a run."""
        o, schedule = self.optimizer_config, self.scheduler_config["name"]
        rate = f"{o['lr']:g}" + (f" ({schedule})" if schedule != "none" else "")
        return f"{type(self).__name__.lower()}, {o['name']}, rate {rate}"

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.cuts) - 2

    def groups(self, workers: int) -> list[range]:
        """The stages of each of ``workers`` processes: neighbours, of nearly equal cost.

        Raises:
            ValueError: if there are fewer stages than workers.
        """
        if workers > self.last + 1:
            raise ValueError(
                f"{workers} workers for {self.last + 1} stage(s): raise strategy.stages, or lower trainer.devices"
            )
        bounds = balanced(self.spec.stage_work(self.cuts, self.extra_cost()), workers)
        return [range(a, b) for a, b in pairwise(bounds)]

    def schedule(self, workers: int) -> str:
        """Who does what when, as a text, by the cost model."""
        forward, backward = (sum(self.spec.step_work()) * passes for passes in (1, 2))
        return schedule_grid([range(1)], [StageTimes(forward=forward, backward=backward)], lag=0)

    @property
    def in_flight(self) -> int:
        """How many tensors a channel must hold so that no worker waits where the algorithm does not."""
        return 2

    @property
    def held(self) -> range:
        """Numbers of the stages whose parameters are here."""
        return self.placement.own

    def place(self, placement: Placement) -> None:
        """Say which stages live here, and what leads to the others; parts that live elsewhere are dropped."""
        self.placement = placement
        for part in self.parts():
            for key in [key for key in part if int(key) not in self.held]:
                del part[key]

    def parts(self) -> list[nn.ModuleDict]:
        """What lives with its stage, by stage number."""
        return [self.stages]

    @override
    def configure_model(self) -> None:
        # Lightning may call this more than once.
        for i in self.held:
            if str(i) not in self.stages:
                self.stages[str(i)] = Stage(self.spec, self.cuts[i], self.cuts[i + 1])

    def stage(self, i: int) -> Stage:
        """Stage i."""
        stage = self.stages[str(i)]
        assert isinstance(stage, Stage)
        return stage

    def own_stages(self) -> Iterator[tuple[int, Stage]]:
        """The stages that live here, in order."""
        for key in self.stages:
            yield int(key), self.stage(int(key))

    def results(self) -> dict[str, float]:
        """What a strategy adds to a training's metrics, once it is over."""
        return {}

    def parameter_counts(self) -> dict[str, int]:
        """How many parameters each part here has, by name: ``stage_0`` and, where there are any, ``estimator_0``."""
        return {f"stage_{i}": sum(p.numel() for p in stage.parameters()) for i, stage in self.own_stages()}

    @override
    def configure_optimizers(self) -> Any:
        epochs, batches = self.trainer.max_epochs or 1, batches_per_epoch(self.trainer)
        configured = []
        for name, optimizer in self.make_optimizers():
            scheduler = make_scheduler(self.scheduler_config, optimizer, epochs, batches)
            configured.append(
                {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": f"lr/{name}"}}
            )
        return configured

    def make_optimizers(self) -> list[tuple[str, Optimizer]]:
        """Named optimisers: the stages' first, then what a strategy adds."""
        return [
            (f"stage_{i}", make_optimizer(self.optimizer_config, stage.parameters()))
            for i, stage in self.own_stages()
        ]

    def optimizer_names(self) -> list[str]:
        """The names of `make_optimizers`, in order."""
        return [f"stage_{i}" for i in self.placement.own]

    def enter(self, i: int, x: Tensor | None, count: int) -> Tensor:
        """What stage i of ``count`` samples begins with: the inputs, or the state from the stage before it."""
        if i == 0:
            assert x is not None
            return x
        with self.recorder.phase("wait", i):
            return self.placement.states[i - 1].receive(self.boundary_shape(i - 1, count)).detach()

    def hand_on(self, i: int, state: Tensor) -> None:
        """Send the state behind stage i down to the next."""
        with self.recorder.phase("send", i):
            self.placement.states[i].send(state)

    def hand_back(self, i: int, gradient: Tensor) -> None:
        """Send the gradient at the beginning of stage i up to the stage before it."""
        with self.recorder.phase("send", i):
            self.placement.gradients[i - 1].send(gradient)

    def boundary_shape(self, i: int, count: int) -> tuple[int, ...]:
        """Shape of a state of ``count`` samples behind stage i."""
        return (count, *self.spec.state_shape(self.cuts[i + 1]))

    def update(self, i: int, count: int) -> None:
        """Update stage i with the gradients that its parameters have; these are of a sum over ``count`` samples."""
        stage = self.stage(i)
        parameters = [p for p in stage.parameters() if p.grad is not None]
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / count)
        extra = penalty([stage], **self.regularisation)
        if extra is not None:
            extra.backward()
        self.adjust_gradients(i)
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        self.step_optimizer(i)

    def adjust_gradients(self, i: int) -> None:
        """Change the gradients of stage i, of the mean loss and the penalties, before they are clipped and used."""

    def step_optimizer(self, i: int) -> None:
        """Update stage i and clear its gradients.

        Only the first optimiser steps through Lightning's wrapper: that is what counts `global_step`, so that it
        counts batches however many optimisers there are.
        """
        index = list(self.stages).index(str(i))
        optimizer: Any = self.wrapped_optimizers()[index]
        if index > 0:
            optimizer = optimizer.optimizer
        optimizer.step()
        optimizer.zero_grad()

    def wrapped_optimizers(self) -> list[Any]:
        """Lightning's wrappers of all optimisers."""
        optimizers = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def schedulers(self) -> list[Any]:
        """All learning-rate schedules."""
        schedulers = self.lr_schedulers()
        return [] if schedulers is None else schedulers if isinstance(schedulers, list) else [schedulers]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sglight"] = self.identity()
        checkpoint["sglight_training"] = self.training_identity()
        checkpoint["progress"] = self.progress()
        # By name: who goes on from here may have other stages in its process.
        for key in BY_OPTIMIZER & checkpoint.keys():
            checkpoint[key] = dict(zip(self.optimizer_names(), checkpoint[key], strict=True))

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.go_on_from(checkpoint.get("progress", {}))
        own = self.state_dict()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in own}
        for key in BY_OPTIMIZER & checkpoint.keys():
            checkpoint[key] = [checkpoint[key][name] for name in self.optimizer_names()]

    def progress(self) -> dict[str, Any]:
        """Where a training is, besides its parameters, in plain containers and tensors."""
        return {}

    def go_on_from(self, progress: Mapping[str, Any]) -> None:
        """Be where `progress` says, before parameters are loaded."""

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the module that loads it, by the keys that set it."""
        network = {
            f"model.{name}": plain(value) for name, value in vars(self.spec).items() if name not in FREE
        }
        return {"strategy": type(self).__name__.lower(), "strategy.stages": len(self.cuts) - 1, **network}

    def training_identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on besides for a training to go on from it: whose states it has."""
        return {
            "strategy.optimizer.name": self.optimizer_config["name"],
            "strategy.scheduler.name": self.scheduler_config["name"],
        }

    def record(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch's summed loss and hits to the running means; where the last stage lives."""
        sums = torch.stack([loss.detach().float(), hits(logits.detach(), labels).float()])
        self.record_sums(sums, len(labels))

    def record_sums(self, sums: Tensor, count: int) -> None:
        """`record` by the two sums, of ``count`` samples."""
        self._sums = sums if self._sums is None else self._sums + sums
        self._seen += count

    def end_batch(self, known: Mapping[str, float | Tensor] | None = None) -> None:
        """Move the learning rates on; log the means since the last time, and what is ``known`` of `curve_names`.

        Within the training step: a callback that then writes a checkpoint finds everything behind the batch.
        """
        for scheduler in self.schedulers():
            if isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()
        if self.is_logging:
            known = dict(known or {})
            if self._sums is not None:
                known["train/loss"], known["train/acc"] = (self._sums / self._seen).unbind()
                self._sums, self._seen = None, 0
            step = self.global_step - 1
            self.curves.report(self.placement.peers, step, self.current_epoch, self.curve_names(), known)
        self.curves.write(self, wait=self.trainer.is_last_batch)

    def curve_names(self) -> list[str]:
        """All names that `end_batch` may get, on whichever worker."""
        return ["train/loss", "train/acc"]

    @property
    def is_logging(self) -> bool:
        """Whether what happens in this batch is logged (asked after the optimiser's step)."""
        trainer: Any = self.trainer  # Lightning does not declare the attribute
        return self.global_step % trainer.log_every_n_steps == 0

    def log_everywhere(self, names: Sequence[str], known: Mapping[str, float]) -> None:
        """Log values of which each is known to one worker, on all of them; every worker waits for the others."""
        values = self.placement.peers.total([known.get(name, 0.0) for name in names]).result()
        self.log_dict(dict(zip(names, values, strict=True)))

    @override
    def on_train_epoch_start(self) -> None:
        self.recorder.clear(self.placement)

    @override
    def on_train_epoch_end(self) -> None:
        # A run may end in mid-epoch (max_time, an early stop).
        self.curves.write(self, wait=True)
        workers = range(self.placement.peers.size)
        names = [f"worker_{r}/{kind}_s" for r in workers for kind in WORKER_TIMES]
        times = self.recorder.shares(self.placement)
        rank = self.placement.peers.rank
        self.log_everywhere(names, {f"worker_{rank}/{kind}_s": s for kind, s in times.items()})
        phases = self.phase_times()
        if all(stage.total for stage in phases):  # not if a run goes on behind the last batch that is timed
            self.log_phases(phases)

    def phase_times(self) -> list[StageTimes]:
        """Median seconds a batch of the phases of all stages, wherever they live; every worker waits for the others."""
        names = [field.name for field in fields(StageTimes)]
        own = {i: vars(self.recorder.typical(i)) for i in self.placement.own}
        known = [own[i][name] if i in own else 0.0 for i in range(self.last + 1) for name in names]
        seconds = iter(self.placement.peers.total(known).result())
        return [StageTimes(*(next(seconds) for _ in names)) for _ in range(self.last + 1)]

    def log_phases(self, times: Sequence[StageTimes]) -> None:
        """Log what `phase_times` gives."""
        for i, stage in enumerate(times):
            self.log_dict({f"time/stage_{i}/{phase}_s": s for phase, s in vars(stage).items()})

    @override
    def forward(self, x: Tensor) -> Tensor:
        assert len(self.stages) == self.last + 1, "not all stages live here"
        for _, stage in self.own_stages():
            x = stage(x)
        return x

    def _evaluate(self, batch: Batch) -> None:
        """Let a batch stream through the stages here; the worker of the last keeps its loss and hits."""
        x, labels = batch
        for i, stage in self.own_stages():
            output = stage(self.enter(i, x, len(labels)))
            if i < self.last:
                self.hand_on(i, output)
            else:
                self.record_evaluation(output, labels)
        self._evaluated_samples += len(labels)

    def record_evaluation(self, logits: Tensor, labels: Tensor) -> None:
        """Keep a batch's summed loss and hits; on one worker."""
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self._evaluated.append(torch.stack([loss, hits(logits, labels).to(loss.dtype)]))

    def _log_evaluation(self, prefix: str) -> dict[str, float]:
        """Log mean loss and accuracy over all batches since the last call, on every worker."""
        means = {f"{prefix}/{name}": value for name, value in self._means().items()}
        for name, value in means.items():
            self.log(name, value, prog_bar=name == "val/acc")
        return means

    def _means(self) -> dict[str, float]:
        """Mean ``loss`` and ``acc`` over all batches since the last call, known to every worker."""
        sums = torch.stack(self._evaluated).double().cpu().tolist() if self._evaluated else [[0.0, 0.0]]
        columns = [math.fsum(column) for column in zip(*sums, strict=True)]
        loss, right = self.placement.peers.total(columns).result()
        samples, self._evaluated, self._evaluated_samples = self._evaluated_samples, [], 0
        return {"loss": loss / samples, "acc": right / samples}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    @override
    def on_validation_epoch_end(self) -> None:
        accuracy = self._log_evaluation("val")["val/acc"]
        if self.trainer.sanity_checking:
            return
        for scheduler in self.schedulers():
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(accuracy)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")


# Lists in Lightning's checkpoints with an entry for each optimiser.
BY_OPTIMIZER = {"optimizer_states", "lr_schedulers"}
WORKER_TIMES = ("busy", "waiting", "communicating")


def batches_per_epoch(trainer: pl.Trainer) -> int:
    """Training batches in an epoch, when optimisers are configured.

    Not from `Trainer.estimated_stepping_batches`: that makes the loader, and Lightning then forgets to tell it at which
    batch a training goes on in mid-epoch.
    """
    loader: Any = trainer.fit_loop._data_source.dataloader()
    return limited(sized_len(loader) or 1, trainer.limit_train_batches)


def limited(available: int, limit: int | float | None) -> int:
    """Batches in an epoch, of those ``available``: a limit is a number of them or a part; at least one."""
    if limit is None:
        return available
    return max(min(available, limit) if isinstance(limit, int) else int(available * limit), 1)


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many are right."""
    return (logits.argmax(1) == labels).sum()


def plain(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    return list(value) if isinstance(value, tuple) else value
