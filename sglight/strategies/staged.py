"""A network in stages as a LightningModule: what Lightning asks of it, whatever its schedule and gradient source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypedDict

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from sglight.compat.lightning import batches_in_loader, count_batches
from sglight.gradients import GradientSource, SyntheticGradient, TrueGradient
from sglight.gradients.base import COMPARED
from sglight.link import Placement
from sglight.networks import NetworkSpec, Stage
from sglight.strategies import agreement, descent, naming
from sglight.strategies.curves import SHOWN, Curves
from sglight.strategies.diagnosis import MEASURED, Diagnosis
from sglight.strategies.evaluation import Evaluation, hits
from sglight.strategies.loss import Loss
from sglight.strategies.optim import (
    EpochLR,
    Length,
    make_optimizer,
    make_scheduler,
    optimizer_settings,
    scheduler_settings,
)
from sglight.strategies.plan import Plan
from sglight.strategies.recorder import Recorder
from sglight.strategies.runtime import Runtime
from sglight.strategies.schedule import Locked, Schedule
from sglight.strategies.simulation import StageTimes, in_flight, speedup

# Inputs and labels; inputs are None where the first stage does not live.
Batch = tuple[Tensor | None, Tensor]

WORKER_TIMES = ("busy", "waiting", "communicating")


class Shared(TypedDict, total=False):
    """The keywords that all strategies share, see `StagedModule`."""

    scheduler: Mapping[str, Any] | None
    clip_norm: float | None
    regularisation: Mapping[str, float] | None
    loss: Mapping[str, Any] | None


class StagedModule(pl.LightningModule):
    """A network in one or more stages, trained with manual optimisation by a schedule and a gradient source.

    Gradients are those of the summed loss on their way through the network, and divided by the batch size where
    they meet the parameters: the mean loss is minimised, and what crosses a boundary does not depend on the
    batch size.

    The stages may live in several processes: `place` says which are here. All processes see the same batches in the
    same order, and what is learnt does not depend on the placement.

    Callbacks see ``on_before_optimizer_step`` once for each stage here and batch, and no ``on_after_backward``.

    Args:
        network: the fields of `NetworkSpec`, as plain containers.
        optimizer, scheduler: see `optim.py`; every stage has its own.
        clip_norm: largest norm of a stage's gradient; None for no limit.
        regularisation: weights of the penalties in `sglight.networks.regularisers.penalty`.
        loss: the arguments of `Loss`.
        stages: M.
        schedule, source: in which order the stages act, and where their gradients come from; by default true gradients
            through all stages in turn.
        diagnose_every_n_batches: see `Diagnosis`.
        multiple: number of steps of which all cuts are multiples.

    Attributes:
        plan: all of the above.
        level: how often the network has been refined: results before and after do not compare.
        part: what the parts are called that workers share out.
        inputs_everywhere: whether all workers need the inputs, not only that of the first stage.
    """

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
        loss: Mapping[str, Any] | None = None,
        schedule: Schedule | None = None,
        source: GradientSource | None = None,
        diagnose_every_n_batches: int = 0,
        multiple: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        spec, source = NetworkSpec(**network), source or TrueGradient()
        cuts = tuple(spec.cuts(stages, source.cost(), multiple))
        self.plan = Plan(
            spec, cuts, optimizer_settings(optimizer), scheduler_settings(scheduler), clip_norm,
            dict(regularisation or {}), Loss(**dict(loss or {})), schedule or Locked(), source,
        )  # fmt: skip
        self.plan.loss.check(spec.classes)
        self.stages, self.estimators = nn.ModuleDict(), nn.ModuleDict()
        self.runtime = Runtime(self.plan, self.stages, self.estimators, self.step_stage)
        self.diagnosis = self.runtime.observer = Diagnosis(diagnose_every_n_batches)
        self.curves = Curves()
        self.evaluation = Evaluation()
        # Whether the workers have compared the first labels of this epoch.
        self._compared = False

    def follow(self, plan: Plan) -> None:
        """Train by another plan from now on."""
        self.plan = self.runtime.plan = plan

    # What it is.

    @property
    def spec(self) -> NetworkSpec:
        """The network as it is now."""
        return self.plan.spec

    @property
    def cuts(self) -> tuple[int, ...]:
        """M + 1 positions from 0 to the number of steps."""
        return self.plan.cuts

    @property
    def is_finest(self) -> bool:
        """Whether the network has the depth that was asked for, and will not be refined."""
        return True

    def describe(self) -> str:
        """The strategy in a line, for the summary of a run."""
        return "; ".join(filter(None, [*self.facts(), descent.describe(self.plan)]))

    def facts(self) -> list[str]:
        """The parts of `describe` that hold for the whole training; some may be empty."""
        optimizer, schedule = self.plan.optimizer, self.plan.scheduler["name"]
        rate = f"{optimizer['lr']:g}" + (f" ({schedule})" if schedule != "none" else "")
        name = f"{type(self).__name__.lower()}, {optimizer['name']}, rate {rate}"
        stages = f"{self.plan.last + 1} stages, {self.plan.schedule.describe()}" if self.plan.last else ""
        return [name, stages, self.plan.source.describe(), self.plan.loss.describe()]

    def schedule(self, workers: int) -> str:
        """Who does what when, as a text, by the cost model."""
        return self.plan.grid(workers)

    def groups(self, workers: int) -> list[range]:
        """The stages of each of ``workers`` processes; see `Plan.groups`."""
        return self.plan.groups(workers)

    def parameter_counts(self) -> dict[str, int]:
        """How many parameters each part here has, by name: ``stage_0`` and, where there are any, ``estimator_0``."""
        parts = {"stage": self.stages, "estimator": self.estimators}
        return {
            f"{kind}_{key}": sum(p.numel() for p in part.parameters())
            for kind, those in parts.items()
            for key, part in those.items()
        }

    def results(self) -> dict[str, float]:
        """What a strategy adds to a training's metrics, once it is over."""
        return {}

    # Where it is.

    @property
    def placement(self) -> Placement:
        """Which stages live here, and what leads to the others."""
        return self.runtime.placement

    @property
    def recorder(self) -> Recorder:
        """What measures the times of this worker."""
        return self.runtime.recorder

    @property
    def in_flight(self) -> int:
        """How many tensors a channel must hold so that no worker waits where the algorithm does not."""
        return in_flight(self.plan.schedule, self.plan.last + 1)

    @property
    def held(self) -> range:
        """Numbers of the stages whose parameters are here."""
        return self.placement.own

    def place(self, placement: Placement) -> None:
        """Say which stages live here, and what leads to the others; parts that live elsewhere are dropped."""
        self.runtime.placement = placement
        for part in (self.stages, self.estimators):
            for key in [key for key in part if int(key) not in self.held]:
                del part[key]

    @override
    def setup(self, stage: str) -> None:
        """Begin a training, or an evaluation, anew: nothing of an earlier one, finished or failed, is taken over."""
        # Comes before a checkpoint is loaded.
        agreement.check_trainer(self.trainer)
        self.evaluation = Evaluation()
        if stage == "fit":
            self.runtime.forget()
            self.diagnosis.next = self.diagnosis.count = 0
            self.curves.forget()

    @override
    def configure_model(self) -> None:
        # Lightning may call this more than once.
        for i in self.held:
            if str(i) not in self.stages:
                self.stages[str(i)] = Stage(self.spec, self.cuts[i], self.cuts[i + 1])
        for i in self.runtime.boundaries:
            if str(i) not in self.estimators and (estimator := self.make_estimator(i)) is not None:
                self.estimators[str(i)] = estimator

    def make_estimator(self, i: int) -> nn.Module | None:
        """What learns at the boundary behind stage i; override this for another kind."""
        return self.plan.source.make_estimator(self.spec, self.cuts, i)

    def stage(self, i: int) -> Stage:
        """Stage i, which lives here."""
        return self.runtime.stage(i)

    def estimator(self, i: int) -> Any:
        """The estimator at the boundary behind stage i, which lives here."""
        return self.estimators[str(i)]

    def own_stages(self) -> Iterator[tuple[int, Stage]]:
        """The stages that live here, in order."""
        for key in self.stages:
            yield int(key), self.stage(int(key))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """The logits of inputs; stages that are not there yet, before a training, are built.

        Raises:
            RuntimeError: on a worker that does not have all stages.
        """
        self._build()
        if len(self.stages) <= self.plan.last:
            raise RuntimeError(
                f"of {self.plan.last + 1} stages only {', '.join(self.stages)} live in this process: call the module "
                "in one that has all of them, such as the one that has started the training"
            )
        for _, stage in self.own_stages():
            x = stage(x)
        return x

    def _build(self) -> None:
        """Build what belongs here and is not there yet, on the module's device, with its type and in its mode."""
        if not self.stages:
            self.configure_model()
            for part in (self.stages, self.estimators):
                part.to(self.device).to(self.dtype).train(self.training)  # type: ignore[arg-type]

    # Optimisers and their schedules.

    @override
    def configure_optimizers(self) -> Any:
        length, configured = training_length(self.trainer), []
        for name, optimizer in self.make_optimizers():
            scheduler = make_scheduler(self.plan.scheduler, optimizer, length)
            configured.append(
                {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": f"lr/{name}"}}
            )
        return configured

    def make_optimizers(self) -> list[tuple[str, Optimizer]]:
        """Named optimisers: the stages' first, then those of the estimators that have one."""
        plan, named = self.plan, list[tuple[str, Optimizer]]()
        for i, stage in self.own_stages():
            late = plan.schedule.lateness(i, plan.last)
            named.append(
                (f"stage_{i}", make_optimizer(plan.optimizer, stage.parameters(), lateness=late))
            )
        for key, estimator in self._learners():
            config = self.plan.source.estimator_optimizer()
            estimator.optimizer = make_optimizer(
                config, estimator.parameters(), "strategy.estimator.optimizer"
            )
            named.append((f"estimator_{key}", estimator.optimizer))
        return named

    def optimizer_names(self) -> list[str]:
        """The names of `make_optimizers`, in order."""
        return [f"stage_{i}" for i in self.placement.own] + [
            f"estimator_{key}" for key, _ in self._learners()
        ]

    def _learners(self) -> list[tuple[str, SyntheticGradient]]:
        """The estimators here that are trained by an optimiser of the strategy's."""
        return [(k, e) for k, e in self.estimators.items() if isinstance(e, SyntheticGradient)]

    def step_stage(self, i: int) -> None:
        """Step the optimiser of stage i and its learning rate's schedule, and clear the gradients."""
        index = list(self.stages).index(str(i))
        optimizer = self.trainer.strategy.optimizers[index]
        self.step_optimizer(optimizer)
        optimizer.zero_grad()
        self._step_schedule(self.schedulers()[index])

    def step_optimizer(self, optimizer: Optimizer, closure: Any = None) -> Any:
        """Step an optimiser as Lightning does, with its hooks, but without counting."""
        return self.trainer.strategy.optimizer_step(optimizer, closure or _nothing)

    def schedulers(self) -> list[Any]:
        """All learning-rate schedules, in the order of the optimisers."""
        schedulers = self.lr_schedulers()
        return [] if schedulers is None else schedulers if isinstance(schedulers, list) else [schedulers]

    @staticmethod
    def _step_schedule(scheduler: Any) -> None:
        if isinstance(scheduler, LRScheduler) and not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()

    # Training.

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, labels = batch
        self._diagnose(x, labels)
        self.runtime.train(x, labels)
        if self.trainer.is_last_batch:
            self.runtime.drain()
        lessons = {f"estimator_{i}/loss": loss for i, loss in self.runtime.lessons.items()}
        self.end_batch({**self.runtime.comparisons, **lessons}, stepped=len(self.stages))

    def _diagnose(self, x: Tensor | None, labels: Tensor) -> None:
        """Look at the gradients of this batch if that is due."""
        trainer: Any = self.trainer
        runtime = self.runtime
        runtime.comparing = False
        if self.diagnosis.is_due(runtime.batch, trainer.log_every_n_steps):
            self.diagnosis.begin(runtime, x, labels)
            # Passes that have true gradients compare on the way what estimators say.
            runtime.comparing = bool(self.plan.source.lesson_every) and not self.plan.source.predicts

    def end_batch(self, known: Mapping[str, float | Tensor] | None = None, stepped: int = 0) -> None:
        """Count the batch, step the schedules behind the first ``stepped``, log what is ``known`` of `curve_names`.

        Within the training step: a callback that then writes a checkpoint finds everything behind the batch.
        """
        self.runtime.batch = max(self.runtime.batch, self.global_step)
        count_batches(self.trainer, self.runtime.batch)
        for scheduler in self.schedulers()[stepped:]:
            self._step_schedule(scheduler)
        if self.trainer.is_last_batch:
            for scheduler in self.schedulers():
                if isinstance(scheduler, EpochLR):
                    scheduler.end_epoch()
        if self.is_logging:
            means = {f"train/{name}": value for name, value in self.runtime.means.take().items()}
            step = self.runtime.batch - 1
            self.curves.report(
                self.placement.peers,
                step,
                self.current_epoch,
                self.curve_names(),
                {**dict(known or {}), **means},
            )
            self.runtime.comparisons = {}
        self.curves.write(self, wait=self.trainer.is_last_batch)
        if self.trainer.is_last_batch:
            self._log_epoch()

    def _log_epoch(self) -> None:
        """Log the epoch's mean loss and accuracy, if there was a batch, for callbacks on every worker."""
        means = {name: float(value) for name, value in self.runtime.means.epoch.take().items()}
        *values, known = self.placement.peers.total(
            [means.get("loss", 0.0), means.get("acc", 0.0), float(bool(means))]
        ).result()
        if known:
            for name, value in zip(SHOWN, values, strict=True):
                self.log(name, value, prog_bar=True, logger=False)

    @property
    def is_logging(self) -> bool:
        """Whether what happens in this batch is logged (asked when it has been counted)."""
        trainer: Any = self.trainer  # Lightning does not declare the attribute
        every = trainer.log_every_n_steps  # 0: never
        return every > 0 and self.runtime.batch % every == 0

    def curve_names(self) -> list[str]:
        """All names that `end_batch` may get, on whichever worker."""
        boundaries = range(self.plan.last if self.plan.source.lesson_every else 0)
        kinds = ("loss", *COMPARED)
        measured = MEASURED if self.diagnosis.every else ()
        return [
            "train/loss",
            "train/acc",
            *(f"stage_{i}/{kind}" for i in range(self.plan.last + 1) for kind in measured),
            *(f"estimator_{i}/{kind}" for i in boundaries for kind in kinds),
        ]

    @override
    def on_train_start(self) -> None:
        # Lightning has restored its count of batches by now, if the training goes on from a checkpoint.
        self.runtime.batch = self.global_step
        self.runtime.take_up_sums()
        self.diagnosis.forget()
        self._compared = False

    @override
    def on_train_epoch_start(self) -> None:
        self.recorder.clear(self.placement)
        self._compared = False

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if not self._compared:
            self._compared = True
            self._compare_batches(batch, self.trainer.num_training_batches, f"epoch {self.current_epoch}")

    def _compare_batches(self, batch: Batch, batches: float, when: str) -> None:
        agreement.check_batches(self.placement.peers, batch[1], batches, when)

    @override
    def on_train_epoch_end(self) -> None:
        # A run may end in mid-epoch (max_time, an early stop).
        self.runtime.drain()
        self.curves.write(self, wait=True)
        self._log_epoch()
        rank, workers = self.placement.peers.rank, range(self.placement.peers.size)
        times = self.recorder.shares(self.placement)
        self.log_everywhere(
            [f"worker_{r}/{kind}_s" for r in workers for kind in WORKER_TIMES],
            {f"worker_{rank}/{kind}_s": s for kind, s in times.items()},
        )
        phases = self.phase_times()
        if all(stage.total for stage in phases):  # not if a run goes on behind the last batch that is timed
            self.log_phases(phases)

    def log_everywhere(self, names: Sequence[str], known: Mapping[str, float]) -> None:
        """Log values of which each is known to one worker, on all of them; every worker waits for the others."""
        values = self.placement.peers.total([known.get(name, 0.0) for name in names]).result()
        self.log_dict(dict(zip(names, values, strict=True)))

    def phase_times(self) -> list[StageTimes]:
        """Median seconds a batch of the phases of all stages, wherever they live; every worker waits for the others."""
        names = [field.name for field in fields(StageTimes)]
        lessons = max(self.plan.source.lesson_every, 1)
        own = {i: vars(self.recorder.typical(i)) for i in self.placement.own}
        known = [own[i][name] if i in own else 0.0 for i in range(self.plan.last + 1) for name in names]
        seconds = iter(self.placement.peers.total(known).result())
        times = [StageTimes(*(next(seconds) for _ in names)) for _ in range(self.plan.last + 1)]
        return [StageTimes(t.forward, t.estimate, t.backward, t.learn / lessons) for t in times]

    def log_phases(self, times: Sequence[StageTimes]) -> None:
        """Log what `phase_times` gives, and what the schedule would gain by it."""
        for i, stage in enumerate(times):
            self.log_dict({f"time/stage_{i}/{phase}_s": s for phase, s in vars(stage).items()})
        if self.plan.last:
            groups = self.plan.shown_groups(self.placement.peers.size)
            self.log("speedup/theoretical", speedup(self.plan.schedule, groups, times))

    # Evaluation.

    @override
    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self._compare_batches(batch, sum(self.trainer.num_val_batches), "the validation")

    @override
    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 0:
            self._compare_batches(batch, sum(self.trainer.num_test_batches), "the test")

    @override
    def on_validation_model_zero_grad(self) -> None:
        """Leave gradients alone in a validation: in mid-epoch they may be sums that are not complete yet."""

    def evaluate(self, batch: Batch) -> None:
        """Let a batch stream through the stages here; the worker of the last keeps its loss and hits."""
        x, labels = batch
        for i, stage in self.own_stages():
            output = stage(self.runtime.enter(i, x, len(labels)))
            if i < self.plan.last:
                self.runtime.hand_down(i, output)
            else:
                self.evaluation.add(self.plan.loss.total(output, labels), hits(output, labels))
        self.evaluation.count(self.plan.loss.normaliser(labels), len(labels))

    def _evaluate(self, batch: Batch) -> None:
        self.evaluate(batch)

    def _log_evaluation(self, prefix: str) -> dict[str, float]:
        """Log mean loss and accuracy over all batches since the last call, on every worker."""
        means = {
            f"{prefix}/{name}": value for name, value in self.evaluation.take(self.placement.peers).items()
        }
        for name, value in means.items():
            self.log(name, value, prog_bar=name == "val/acc")
        return means

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

    # What pvd still asks for.

    @property
    def optimizer_config(self) -> dict[str, Any]:
        return dict(self.plan.optimizer)

    @property
    def regularisation(self) -> dict[str, float]:
        return dict(self.plan.regularisation)

    @property
    def clip_norm(self) -> float | None:
        return self.plan.clip_norm

    def record_sums(self, sums: Tensor, count: int) -> None:
        self.runtime.means.add(sums[0], sums[1], count, count)

    def record_evaluation(self, logits: Tensor, labels: Tensor) -> None:
        self.evaluation.add(self.plan.loss.total(logits, labels), hits(logits, labels))

    @property
    def _evaluated_samples(self) -> int:
        return 0

    @_evaluated_samples.setter
    def _evaluated_samples(self, count: int) -> None:
        self.evaluation.count(count, count)

    def wrapped_optimizers(self) -> list[Any]:
        optimizers: Any = self.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]

    # Checkpoints.

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sglight"] = self.identity()
        checkpoint["sglight_training"] = self.training_identity()
        checkpoint["progress"] = self.progress()
        checkpoint["in_flight"] = self.runtime.under_way()
        naming.by_name(checkpoint, self.optimizer_names())

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer = self._trainer
        training = self.training_identity() if trainer and trainer.state.fn == TrainerFn.FITTING else None
        path = getattr(trainer, "ckpt_path", None)
        naming.check(checkpoint, self.identity(), training, f"ckpt_path={path}" if path else "this")
        self.go_on_from(checkpoint["progress"])
        self._build()
        self.runtime.take_up(checkpoint.get("in_flight", {}))
        own = self.state_dict()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in own}
        naming.by_number(checkpoint, self.optimizer_names())

    def progress(self) -> dict[str, Any]:
        """Where a training is, besides its parameters, in plain containers and tensors; the same on all workers."""
        return {
            "batch": self.runtime.batch, "round": self.runtime.round, "next_diagnosis": self.diagnosis.next,
        }  # fmt: skip

    def go_on_from(self, progress: Mapping[str, Any]) -> None:
        """Be where `progress` says, before parameters are loaded."""
        self.runtime.begin(progress["batch"], progress["round"])
        self.diagnosis.next = progress["next_diagnosis"]

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the module that loads it, by the keys that set it."""
        return naming.identity(type(self).__name__.lower(), self.plan)

    def training_identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on besides for a training to go on from it: whose states it has."""
        return naming.training_identity(self.plan)


def training_length(trainer: pl.Trainer) -> Length:
    """How long a training is, as far as that is known when optimisers are configured."""
    available, limit = batches_in_loader(trainer), trainer.limit_train_batches
    if available is None:
        batches = max(limit, 1) if isinstance(limit, int) else None
    else:
        batches = limited(max(available, 1), limit)
    epochs, updates = (None if most in (None, -1) else most for most in (trainer.max_epochs, trainer.max_steps))
    return Length(epochs, batches, updates)


def limited(available: int, limit: int | float | None) -> int:
    """Batches in an epoch, of those ``available``: a limit is a number of them or a part; at least one."""
    if limit is None:
        return available
    return max(min(available, limit) if isinstance(limit, int) else int(available * limit), 1)


def _nothing() -> None:
    pass
