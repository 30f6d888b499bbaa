"""The training of a network in stages: its optimisers, the training step and the logged values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from sglight.compat.lightning import batches_in_loader, count_batches, log_quickly
from sglight.gradients import TrainedEstimator
from sglight.gradients.base import COMPARED
from sglight.networks.drift import LIMIT
from sglight.strategies import agreement, flight
from sglight.strategies.core import Batch, StagedNetwork
from sglight.strategies.curves import SHOWN
from sglight.strategies.diagnosis import MEASURED
from sglight.strategies.evaluation import RunningMeans
from sglight.strategies.optim import (
    EpochLR,
    Length,
    make_optimizer,
    make_scheduler,
)
from sglight.strategies.simulation import StageTimes, speedup

WORKER_TIMES = ("busy", "waiting", "communicating")


class StagedTraining(StagedNetwork):
    """Optimisers, training step and logged values of a network in stages; see `StagedModule`."""

    # Optimisers and their schedules.

    @override
    def configure_optimizers(self) -> Any:
        log_quickly()
        length, configured = training_length(self.trainer), []
        for name, optimizer in self.make_optimizers():
            scheduler = make_scheduler(self.plan.scheduler, optimizer, length)
            configured.append(
                {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "name": f"lr/{name}"}}
            )
        return configured

    def make_optimizers(self) -> list[tuple[str, Optimizer]]:
        """The optimisers of the stages here, and after them those of the estimators, each with its name."""
        plan, named = self.plan, list[tuple[str, Optimizer]]()
        for i, stage in self.own_stages():
            late = plan.schedule.lateness(i, plan.last)
            named.append((f"stage_{i}", make_optimizer(plan.optimizer, stage.parameters(), lateness=late)))
        for key, estimator in self._learners():
            config = self.estimator_optimizer()
            estimator.optimizer = make_optimizer(config, estimator.parameters(), estimator.optimizer_key)
            named.append((f"estimator_{key}", estimator.optimizer))
        return named

    def estimator_optimizer(self) -> dict[str, Any]:
        """The settings of the optimiser of each estimator."""
        return self.plan.source.estimator_optimizer()

    def optimizer_names(self) -> list[str]:
        """The names of `make_optimizers`, in order."""
        return [f"stage_{i}" for i in self.placement.own] + [
            f"estimator_{key}" for key, _ in self._learners()
        ]

    def _learners(self) -> list[tuple[str, TrainedEstimator]]:
        """The estimators here that the strategy gives an optimiser."""
        return [(k, e) for k, e in self.estimators.items() if isinstance(e, TrainedEstimator)]

    @override
    def step_stage(self, i: int) -> None:
        """Step the optimiser of stage i and the schedule of its learning rate, and clear its gradients."""
        index = list(self.stages).index(str(i))
        optimizer = self.trainer.strategy.optimizers[index]
        self.step_optimizer(optimizer)
        optimizer.zero_grad()
        self._step_schedule(self.schedulers()[index])

    def step_optimizer(self, optimizer: Optimizer, closure: Any = None) -> Any:
        """Step an optimiser with the hooks that Lightning calls, but without Lightning's count of steps."""
        return self.trainer.strategy.optimizer_step(optimizer, closure or _nothing)

    def schedulers(self) -> list[Any]:
        """The learning-rate schedules, in the order of the optimisers."""
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
        drifts = {f"stage_{i}/drift": error for i, error in self.runtime.drifts.items()}
        self.end_batch({**self.runtime.comparisons, **lessons, **drifts}, stepped=len(self.stages))

    def _diagnose(self, x: Tensor | None, labels: Tensor) -> None:
        """Measure the gradients of this batch, if it is one of those that are diagnosed."""
        trainer: Any = self.trainer
        runtime = self.runtime
        runtime.comparing = False
        if self.diagnosis.is_due(runtime.batch, trainer.log_every_n_steps):
            self.diagnosis.begin(runtime, x, labels)
            # Backward passes with true gradients compare these with the predictions of estimators.
            runtime.comparing = bool(self.plan.source.lesson_every) and not self.plan.source.predicts

    def end_batch(self, known: Mapping[str, float | Tensor] | None = None, stepped: int = 0) -> None:
        """Count the batch, step learning-rate schedules and log values.

        This must happen within the training step, so that a callback that writes a checkpoint after it saves a state
        in which the batch is complete.

        Args:
            known: the values among `curve_names` that this worker knows.
            stepped: the number of learning-rate schedules, from the first, that have been stepped already.
        """
        count_batches(self.trainer, self.runtime.batch)
        for scheduler in self.schedulers()[stepped:]:
            self._step_schedule(scheduler)
        if self.trainer.is_last_batch:
            for scheduler in self.schedulers():
                if isinstance(scheduler, EpochLR):
                    scheduler.end_epoch()
        if self.is_logging:
            weights = self._weights(self.runtime.means)
            means = {f"train/{name}": value for name, value in self.runtime.means.take().items()}
            step = self.runtime.batch - 1
            self.curves.report(
                self.placement.peers,
                step,
                self.current_epoch,
                self.curve_names(),
                {**dict(known or {}), **means},
                weights={f"train/{name}": weight for name, weight in weights.items()},
            )
            self.runtime.comparisons = {}
            self._warn_of_drifts()
        self.curves.write(self, wait=self.trainer.is_last_batch)
        if self.trainer.is_last_batch:
            self._log_epoch()

    def _warn_of_drifts(self) -> None:
        """Warn, once for each stage, if its rebuilt states differ too much from those of the forward pass."""
        for i, error in self.runtime.drifts.items():
            if float(error) > LIMIT and i not in self._warned:
                self._warned.add(i)
                key = "strategy.backward=rebuilt" if self.plan.source.rebuilds else "model.reversible=true"
                warnings.warn(
                    f"{key}: the states that stage {i} rebuilds have a relative error of {float(error):.2g}, and its "
                    "gradients at least as much; use more stages, a shorter model.horizon, trainer.precision=64-true, "
                    f"or {'strategy.backward=stashed' if self.plan.source.rebuilds else 'model.reversible=false'}",
                    stacklevel=2,
                )
        self.runtime.drifts = {}

    def _log_epoch(self) -> None:
        """Log mean loss and accuracy of the epoch, for callbacks on every worker, if it has had a batch."""
        weights = self._weights(self.runtime.means.epoch)
        means = self.runtime.means.epoch.take()
        known = [float(means[name]) * weights[name] if means else 0.0 for name in weights]
        known += [weight if means else 0.0 for weight in weights.values()]
        loss, acc, *sums = self.placement.peers.total(known).result()
        if all(sums):
            for name, value, weight in zip(SHOWN, (loss, acc), sums, strict=True):
                self.log(name, value / weight, prog_bar=True, logger=False)

    def _weights(self, means: RunningMeans) -> dict[str, float]:
        """The weights of the means over this replica's samples in the means over all samples; 1 without replicas."""
        return means.weights if self.placement.replicas.size > 1 else dict.fromkeys(means.weights, 1.0)

    @property
    def is_logging(self) -> bool:
        """Whether values of this batch are logged; to be read after the batch has been counted."""
        trainer: Any = self.trainer  # Lightning does not declare the attribute
        every = trainer.log_every_n_steps  # 0: never
        return every > 0 and self.runtime.batch % every == 0

    def curve_names(self) -> list[str]:
        """The names of all values that `end_batch` may get at any worker."""
        boundaries = range(self.plan.last if self.plan.source.has_estimators else 0)
        kinds = ("loss", *COMPARED)
        measured = MEASURED if self.diagnosis.every else ()
        return [
            "train/loss",
            "train/acc",
            *(f"stage_{i}/{kind}" for i in range(self.plan.last + 1) for kind in measured),
            *(f"stage_{i}/drift" for i in range(self.plan.last + 1) if self.plan.rebuilds),
            *(f"boundary_{i}/{kind}" for i in range(self.plan.last) for kind in COMPARED if measured),
            *(f"estimator_{i}/{kind}" for i in boundaries for kind in kinds),
        ]

    @override
    def on_train_start(self) -> None:
        # If the training continues from a checkpoint, Lightning has restored its count of batches by now.
        self.runtime.batch = self.global_step
        flight.restore_sums(self.runtime)
        self.diagnosis.forget()
        self.rates.begin(self.trainer, self.placement.peers)
        self._compared = False
        self._warned = set[int]()

    @override
    def on_train_epoch_start(self) -> None:
        self.recorder.clear(self.placement)
        self._compared = False
        self._report_rates()

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if not self._compared:
            self._compared = True
            self._compare_batches(batch, self.trainer.num_training_batches, f"epoch {self.current_epoch}")
        self._report_rates()

    def _report_rates(self) -> None:
        self.rates.report(self.trainer, self.placement.peers, self.curves, self.runtime.batch)

    def _compare_batches(self, batch: Batch, batches: float, when: str) -> None:
        agreement.check_batches(self.placement.peers, batch[1], batches, when)

    @override
    def on_train_epoch_end(self) -> None:
        # A run may end within an epoch, by max_time or an early stop.
        self.runtime.drain()
        self.average_statistics()
        self.curves.write(self, wait=True, hidden=SHOWN)
        self._log_epoch()
        rank, workers = self.placement.peers.rank, range(self.placement.peers.size)
        times = self.recorder.shares(self.placement)
        self.log_everywhere(
            [f"worker_{r}/{kind}_s" for r in workers for kind in WORKER_TIMES],
            {f"worker_{rank}/{kind}_s": s for kind, s in times.items()},
        )
        phases = self.phase_times()
        if all(stage.total for stage in phases):  # a resumed run may have had no timed batch yet
            self.log_phases(phases)

    def log_everywhere(self, names: Sequence[str], known: Mapping[str, float]) -> None:
        """Log, at all workers, values that only one of them knows; all workers must call it, and wait for each other.

        Args:
            names: of all values, the same at all workers.
            known: the values of this worker.
        """
        values = self.placement.peers.total([known.get(name, 0.0) for name in names]).result()
        self.log_dict(dict(zip(names, values, strict=True)))

    def phase_times(self) -> list[StageTimes]:
        """The seconds of each phase of all stages, in the median batch; all workers must call it.

        For replicas, each with its part of a batch, it is the mean over them.
        """
        names = [field.name for field in fields(StageTimes)]
        lessons = max(self.plan.source.lesson_every, 1)
        own = {i: vars(self.recorder.typical(i)) for i in self.placement.own}
        known = [own[i][name] if i in own else 0.0 for i in range(self.plan.last + 1) for name in names]
        replicas = self.placement.replicas.size
        seconds = iter([total / replicas for total in self.placement.peers.total(known).result()])
        times = [StageTimes(*(next(seconds) for _ in names)) for _ in range(self.plan.last + 1)]
        return [replace(t, learn=t.learn / lessons) for t in times]

    def log_phases(self, times: Sequence[StageTimes]) -> None:
        """Log the times of `phase_times`, and the speed-up that the schedule would have with them."""
        for i, stage in enumerate(times):
            self.log_dict({f"time/stage_{i}/{phase}_s": s for phase, s in vars(stage).items()})
        replicas = self.placement.replicas.size
        if self.plan.last or replicas > 1:
            groups = self.plan.shown_groups(self.placement.pipeline.size, replicas)
            self.log("speedup/theoretical", replicas * speedup(self.plan.schedule, groups, times))


def training_length(trainer: pl.Trainer) -> Length:
    """The length of a training, as far as it is known when optimisers are configured."""
    available, limit = batches_in_loader(trainer), trainer.limit_train_batches
    if available is None:
        batches = max(limit, 1) if isinstance(limit, int) else None
    else:
        batches = limited(max(available, 1), limit)
    epochs, updates = (
        None if most in (None, -1) else most for most in (trainer.max_epochs, trainer.max_steps)
    )
    return Length(epochs, batches, updates)


def limited(available: int, limit: int | float | None) -> int:
    """The number of batches in an epoch, at least one.

    Args:
        available: the number of batches that the data has.
        limit: how many of them to use, as a number (int) or as a fraction (float); None for all.

    >>> limited(100, 0.25), limited(100, 30), limited(100, None)
    (25, 30, 100)
    """
    if limit is None:
        return available
    return max(min(available, limit) if isinstance(limit, int) else int(available * limit), 1)


def _nothing() -> None:
    pass
