"""Multilevel training in depth: train a shallow network, refine it in time, and continue with the deeper one.

Haber & Ruthotto 2017, section 5; Chang et al. 2018. From one level to the next N doubles, T stays and h is halved:

    theta'_{2j} = theta_j,  theta'_{2j+1} = (theta_j + theta_{j+1}) / 2   (``linear``), or theta_j (``constant``)
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise
from math import inf
from time import perf_counter, process_time
from typing import Any, Unpack

import torch
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from sglight import units
from sglight.compat.lightning import batch_size
from sglight.config.levels import Course, Level, make_levels
from sglight.gradients import LocalLoss, Synthetic
from sglight.gradients.delayed import check_backward
from sglight.networks import NetworkSpec, Stage
from sglight.networks.segment import Rule
from sglight.strategies import descent, naming, refinement
from sglight.strategies.loss import Loss
from sglight.strategies.modes import Modes
from sglight.strategies.optim import carry_over
from sglight.strategies.pieces import settled
from sglight.strategies.plan import Plan
from sglight.strategies.replication import check_estimators
from sglight.strategies.simulation import in_flight
from sglight.strategies.staged import InStages, StagedModule
from sglight.strategies.stopping import NextLevel, begin_anew


class Multilevel(StagedModule):
    """Training from coarse to fine; each level is trained by a staged strategy.

    Where Lightning's `EarlyStopping` would end the training at a coarse level, the next level begins, and it monitors
    that anew. If all levels that are left have a number of epochs, the last one gets the epochs that were saved.

    A second fit continues with the network as it is: with the level that it has reached and those after it, whose
    epochs must add up. If that is the finest level, it gets all epochs. The history begins anew.

    Args:
        network: the finest one.
        optimizer, shared: see `StagedModule`.
        stages, lag, estimator, diagnose_every_n_batches: see `DNI`.
        microbatches, slack, backward: of levels with late gradients, see `Delayed`; microbatches also of levels with
            exact gradients and without estimators, see `Backprop`.
        levels: the number of levels; each has twice the steps of the one before it.
        level: ``epochs, mode, lr, estimator_lr, microbatches``: each one value for all levels, or a list.
        prolongation: of the parameters in a refinement: ``linear``, or ``constant`` for each step twice.
        moments: ``prolong`` the moments of optimisers in a refinement, or ``reset`` those of the stages (estimators
            keep theirs); None for ``reset`` where late gradients begin, and ``prolong`` elsewhere.
        head: of levels with local losses, see `Local`.

    Attributes:
        level: the present one, from 0.
        plans: of all levels.
        course: which level is trained when.
        history: for each level that has begun: ``steps``; ``epochs``; ``fit_s`` and ``cpu_s`` (of all workers), with
            validations and the refinement; ``val_acc`` and ``val_loss`` of its last epoch; and the validation losses
            ``loss_before`` and ``loss_after`` its refinement.

    Raises:
        ValueError: if the steps cannot be halved so often, or leave too few for the stages.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        stages: int = 2,
        lag: int = 1,
        estimator: Mapping[str, Any] | None = None,
        diagnose_every_n_batches: int = 50,
        microbatches: int | None = None,
        slack: int = 0,
        backward: str = "stashed",
        levels: int = 2,
        level: Mapping[str, Any] | None = None,
        prolongation: Rule = "linear",
        moments: str | None = None,
        head: Mapping[str, Any] | None = None,
        **shared: Unpack[InStages],
    ) -> None:
        for key, value, options in (
            ("prolongation", prolongation, ("linear", "constant")),
            ("moments", moments, ("prolong", "reset", None)),
        ):
            if value not in options:
                names = " or ".join(option or "null" for option in options)
                raise ValueError(f"strategy.{key}={value} is unknown; choose {names}")
        self.levels = make_levels(levels, level)
        modes = {each.mode for each in self.levels}
        estimated: Synthetic | LocalLoss | None = None
        loss = Loss(**dict(shared.get("loss") or {}))
        if "dni" in modes:
            estimated = Synthetic.of(estimator, network.get("kernel", "dense"), loss)
        elif "local" in modes:
            estimated = LocalLoss.of(head, loss)
        self.modes = Modes(stages, lag, estimated, microbatches, slack, backward)
        coarsest = 2 ** (levels - 1)
        spec = NetworkSpec(**network)
        spec.coarsened(coarsest)  # raises an error if the steps cannot be halved
        if "delayed" in modes:
            check_backward(backward, spec)
        super().__init__(
            network, optimizer, **shared, stages=stages, source=estimated,
            diagnose_every_n_batches=diagnose_every_n_batches, multiple=coarsest,
        )  # fmt: skip
        if self.spec.initial_velocity != "zero" and levels > 1:
            raise ValueError(
                "model.initial_velocity=paper starts with a velocity of y / h, another one on each of strategy.levels="
                f"{levels}; use model.initial_velocity=zero"
            )
        self.prolongation, self.moments = prolongation, moments
        self.plans = tuple(level_plan(self.plan, self.levels, k, self.modes) for k in range(levels))
        self.history: list[dict[str, float]] = []
        self.course = Course()
        # Whether something other than early stopping has asked the Trainer to stop.
        self.stop_requested = False
        self._clocks = 0.0, 0.0
        self._go_to(0)

    def _go_to(self, level: int) -> None:
        """Switches to the plan of a level."""
        self.level = level
        self.follow(self.plans[level])

    @property
    @override
    def is_finest(self) -> bool:
        return self.level == len(self.levels) - 1

    @override
    def groups(self, workers: int) -> list[range]:
        return self.plans[-1].groups(workers)

    @property
    @override
    def in_flight(self) -> int:
        return max(in_flight(plan.schedule, plan.last + 1) for plan in self.plans)

    @override
    def schedule(self, groups: int, replicas: int = 1) -> str:
        finest = self.plans[-1]
        schedules = dict.fromkeys(plan.schedule for plan in self.plans)
        return "\n\n".join(
            replace(finest, schedule=schedule).grid(groups, replicas) for schedule in schedules
        )

    @override
    def check_replicas(self, replicas: int) -> None:
        for plan in self.plans:
            check_estimators(plan.source, replicas)

    @override
    def describe(self) -> str:
        course = self.course if self.trainer.state.fn == TrainerFn.FITTING else Course()
        epochs, parts = [*self._firsts(course), self.trainer.max_epochs or 0], []
        left = zip(self.levels[course.level :], self.plans[course.level :], pairwise(epochs), strict=True)
        for level, plan, (first, stop) in left:
            rate = "" if level.lr is None else f", rate {level.lr:g}"
            span = units.plural(stop - first, "epoch")
            about = f"{plan.spec.total_steps} steps, {level.mode}{rate}, {span}"
            parts.append(", ".join(filter(None, [about, descent.describe(plan)])))
        return "; ".join(filter(None, [*self.facts(), f"from coarse to fine: {'; '.join(parts)}"]))

    def _firsts(self, course: Course) -> list[int]:
        """The first epochs of the levels of a course; in a dev run all levels begin at once."""
        trainer: Any = self.trainer
        if trainer.fast_dev_run:
            return [course.epoch] * (len(self.levels) - course.level)
        return course.firsts(self.levels, self.trainer.max_epochs or 0)

    def end_level(self) -> None:
        """Ends the present level, so that the next one begins with the next epoch.

        The epochs that are left are distributed as at the beginning. If all levels that are left have a number of
        epochs, the finest one gets the rest.
        """
        self.course = Course(self.level + 1, self.current_epoch + 1, strict=False)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            self._settle(batch_size(self.trainer))
            trained = self.level > 0 or bool(self.history)
            strict = not (trained and self.is_finest)
            self.course, self.history = Course(self.level, self.trainer.current_epoch, strict), []
            NextLevel.attach(self.trainer)

    def _settle(self, samples: int | None) -> None:
        """Sets the numbers of pieces in all plans, when the batch size is known."""
        self.plans = tuple(
            replace(plan, schedule=settled(plan.schedule, self.modes.pieces(level), samples, plan.last))
            for level, plan in zip(self.levels, self.plans, strict=True)
        )
        self.follow(self.plans[self.level])

    @override
    def make_estimator(self, i: int) -> nn.Module | None:
        # Estimators are built at the beginning, also if the first level does not need them.
        source = self.modes.estimated or self.plan.source
        return source.make_estimator(self.spec, self.cuts, i)

    @override
    def estimator_optimizer(self) -> dict[str, Any]:
        known = self.plan.source if self.plan.source.has_estimators else self.modes.estimated
        assert known is not None
        return known.estimator_optimizer()

    @override
    def on_fit_start(self) -> None:
        self._firsts(self.course)  # raises an error if the epochs do not add up

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        # Not only in `on_train_epoch_start`, which is not called when an epoch is resumed in the middle.
        self._clocks = perf_counter(), process_time()

    @override
    def on_train_epoch_start(self) -> None:
        self._clocks = perf_counter(), process_time()
        if not self.history:
            self._begin_level({})
        begun = bisect_right(self._firsts(self.course), self.current_epoch)
        while self.level < self.course.level + begun - 1:
            self.refine()
        super().on_train_epoch_start()

    def refine(self) -> None:
        """Doubles the steps of the stages, with their optimisers and all schedules; estimators are not changed."""
        before = self._validation_loss()
        coarse, schedulers = dict(self.own_stages()), self.schedulers()
        states: list[refinement.State] = [
            optimizer.state_dict()["state"] for optimizer in self.trainer.strategy.optimizers
        ]
        heads = refinement.heads(coarse, states, self.placement.peers)
        self._go_to(self.level + 1)
        for i, stage in coarse.items():
            self.stages[str(i)] = stage.refine(self.prolongation, heads.get(i + 1))
        self.share()
        # Builds new optimisers and registers them with Lightning.
        self.trainer.strategy.setup_optimizers(self.trainer)
        for (i, stage), k in zip(coarse.items(), range(len(states)), strict=False):
            following = heads.get(i + 1, {})
            states[k] = (
                {}
                if self._forgets_moments
                else refinement.prolonged(states[k], stage, self.prolongation, following)
            )
        for optimizer, state in zip(self.trainer.strategy.optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for scheduler, earlier in zip(self.schedulers(), schedulers, strict=True):
            carry_over(scheduler, earlier)
        self._begin_level({"loss_before": before, "loss_after": self._validation_loss()})

    @property
    def _forgets_moments(self) -> bool:
        """Whether the optimisers of the stages begin this level without moments.

        The small second moments of exact gradients would make the first late steps too long.
        """
        late, before = (
            plan.schedule.lateness(0, plan.last) > 0 for plan in (self.plan, self.plans[self.level - 1])
        )
        return self.moments == "reset" or (self.moments is None and late and not before)

    def _begin_level(self, losses: Mapping[str, float | None]) -> None:
        """Begins the history of the present level, with the validation losses before and after its refinement."""
        for stopping in self.trainer.early_stopping_callbacks:
            begin_anew(stopping)
        known = {name: loss for name, loss in losses.items() if loss is not None}
        self.log_dict({f"refinement/{name}": loss for name, loss in known.items()})
        clocks = {"epochs": 0, "fit_s": 0.0, "cpu_s": 0.0}
        self.history.append({"steps": self.spec.total_steps, **clocks, **known})

    @torch.no_grad()
    def _validation_loss(self) -> float | None:
        """The present mean loss on the validation data; None without such data."""
        trainer: Any = self.trainer
        loader, limits = trainer.val_dataloaders, trainer.num_val_batches
        if not loader or not sum(limits):
            return None
        self.average_statistics()
        self.eval()
        for batch in islice(loader, None if limits[0] == inf else int(limits[0])):
            batch = trainer.precision_plugin.convert_input(batch)
            with trainer.precision_plugin.val_step_context():
                self.evaluate(trainer.strategy.batch_to_device(batch))
        self.train()
        return self.evaluation.take(self.placement.peers)["loss"]

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.stop_requested = self.trainer.should_stop
        means = self.trainer.callback_metrics
        if self.trainer.sanity_checking or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.history[-1] |= {f"val_{name}": float(means[f"val/{name}"]) for name in ("loss", "acc")}

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.stop_requested = self.trainer.should_stop
        wall, cpu = perf_counter() - self._clocks[0], process_time() - self._clocks[1]
        now = self.history[-1]
        now["epochs"] += 1
        now["fit_s"] += wall
        now["cpu_s"] += self.placement.peers.total([cpu]).result()[0]
        self.log("level", float(self.level))

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        if not self.is_finest:
            steps = f"{self.spec.total_steps} of {self.plans[-1].spec.total_steps} steps"
            rank_zero_warn(
                f"the training has ended with {steps}, before the finest level; another fit, or one from its "
                "checkpoint, goes on from there"
            )

    @override
    def results(self) -> dict[str, float]:
        return {f"level_{k}/{name}": v for k, facts in enumerate(self.history) for name, v in facts.items()}

    @override
    def identity(self) -> dict[str, Any]:
        name = type(self).__name__.lower()
        return {**naming.identity(name, self.plans[-1]), "strategy.levels": len(self.levels)}

    @override
    def progress(self) -> dict[str, Any]:
        course = [self.course.level, self.course.epoch, self.course.strict]
        return {**super().progress(), "level": self.level, "history": self.history, "course": course}

    @override
    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        super().restore_progress(progress)
        self.history = [dict(facts) for facts in progress["history"]]
        self.course = Course(*progress["course"])
        if progress["level"] != self.level:
            self._go_to(progress["level"])
            for i, stage in dict(self.own_stages()).items():
                example = next(stage.parameters())
                other = Stage(self.spec, *self.cuts[i : i + 2]).to(example.device, example.dtype)
                self.stages[str(i)] = other.train(stage.training)
            self.share()


def level_plan(finest: Plan, levels: Sequence[Level], k: int, modes: Modes) -> Plan:
    """The plan of level k, given that of the finest level."""
    level, coarseness = levels[k], 2 ** (len(levels) - 1 - k)
    schedule, source = modes.of(level, finest.spec.rule, 2**k)
    optimizer = finest.optimizer
    return replace(
        finest,
        spec=finest.spec.coarsened(coarseness),
        cuts=tuple(cut // coarseness for cut in finest.cuts),
        optimizer=optimizer if level.lr is None else {**optimizer, "lr": level.lr},
        schedule=schedule,
        source=source,
        coarseness=coarseness,
    )
