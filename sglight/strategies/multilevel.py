"""Multilevel training in depth: train a shallow network, refine it in time, and go on with the deeper one.

Haber & Ruthotto 2017, section 5; Chang et al. 2018. From one level to the next N doubles, T stays and h is halved:

    theta'_{2j} = theta_j,  theta'_{2j+1} = (theta_j + theta_{j+1}) / 2   (``linear``), or theta_j (``constant``)

A gradient with respect to one sample theta_j is h times a function of time. So the optimiser's first moments are
prolonged as theta is and multiplied by 1/2, its second moments by 1/4.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from math import inf
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from sglight.networks import Stage
from sglight.networks.segment import Rule, prolong
from sglight.strategies.base import Batch
from sglight.strategies.dni import DNI, compare
from sglight.strategies.grid import group_speedup, schedule_grid
from sglight.strategies.levels import first_epochs, make_levels
from sglight.strategies.optim import go_on
from sglight.strategies.schedule import StageTimes

# What halving h does to the moments of a gradient, by the optimisers' names for them.
MOMENTS = {"exp_avg": 0.5, "exp_avg_sq": 0.25, "momentum_buffer": 0.5}

# An optimiser's state: of each parameter, by its number, what belongs to it, by name.
State = dict[int, dict[str, Any]]


class Multilevel(DNI):
    """DNI from coarse to fine; arguments as in `DNI`, ``network`` being the finest, and

    Args:
        levels: how many depths; each has twice the steps of the one before it.
        level: ``epochs, mode, lr, estimator_lr``: see `sglight.strategies.levels.Level`.
        prolongation: ``linear`` or ``constant``.
        moments: ``prolong`` them, or ``reset`` those of the stages; estimators keep theirs.

    Attributes:
        level: the current one, from 0.
        history: of each level begun: ``steps``; ``epochs``; ``fit_s`` and ``cpu_s`` (of all workers), with validations
            and the refinement; ``val_acc`` and ``val_loss`` of its last epoch; and, of the validation data,
            ``loss_before`` and ``loss_after`` the refinement that it begins with.

    Raises:
        ValueError: if the steps cannot be halved so often, or leave too few for the stages.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        scheduler: Mapping[str, Any] | None = None,
        clip_norm: float | None = None,
        regularisation: Mapping[str, float] | None = None,
        stages: int = 2,
        lag: int = 1,
        estimator: Mapping[str, Any] | None = None,
        diagnose_every_n_batches: int = 50,
        levels: int = 2,
        level: Mapping[str, Any] | None = None,
        prolongation: Rule = "linear",
        moments: str = "prolong",
    ) -> None:
        self.levels = make_levels(levels, level)
        super().__init__(
            network, optimizer, scheduler, clip_norm, regularisation, stages, lag, estimator, diagnose_every_n_batches
        )  # fmt: skip
        for key, value, options in (
            ("prolongation", prolongation, ("linear", "constant")),
            ("moments", moments, ("prolong", "reset")),
        ):
            if value not in options:
                raise ValueError(f"strategy.{key}={value} is unknown; choose {' or '.join(options)}")
        if self.spec.initial_velocity != "zero" and levels > 1:
            raise ValueError(
                "model.initial_velocity=paper starts with a velocity of y / h, another one on each of strategy.levels="
                f"{levels}; use model.initial_velocity=zero"
            )
        self.prolongation, self.moments = prolongation, moments
        self._finest = self.spec, self.cuts, self.optimizer_config, self.estimator_config
        self.history: list[dict[str, float]] = []
        self._clocks = 0.0, 0.0
        self._go_to(0)

    @override
    def make_cuts(self, stages: int) -> list[int]:
        factor = self._factor(0)
        self.spec.coarsened(factor)  # refuses what cannot be halved
        return self.spec.cuts(stages, self.extra_cost(), factor)

    def _factor(self, level: int) -> int:
        """How many of the finest steps make one of that level."""
        return int(2 ** (len(self.levels) - 1 - level))

    def _go_to(self, level: int) -> None:
        """Describe the network, the cuts and the learning rates of a level."""
        self.level, now, factor = level, self.levels[level], self._factor(level)
        spec, cuts, optimizer, estimator = self._finest
        self.spec, self.cuts = spec.coarsened(factor), [cut // factor for cut in cuts]
        self.optimizer_config = optimizer if now.lr is None else {**optimizer, "lr": now.lr}
        self.estimator_config = estimator
        if now.estimator_lr is not None:
            learning = {**estimator["optimizer"], "lr": now.estimator_lr}
            self.estimator_config = {**estimator, "optimizer": learning}

    @property
    @override
    def is_finest(self) -> bool:
        return self.level == len(self.levels) - 1

    @override
    def adjust_gradients(self, i: int) -> None:
        # A longer step has larger gradients; the optimiser's decay of its weights is to be as much larger.
        more = self.optimizer_config.get("weight_decay", 0.0) * (self._factor(self.level) - 1)
        if more and self.optimizer_config["name"] != "adamw":  # whose decay does not add to gradients
            for name, parameter in self.stage(i).named_parameters():
                if name.startswith("segments.") and parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=more)

    @contextmanager
    def _at(self, level: int) -> Iterator[None]:
        """As if the training were at another level."""
        now = self.level
        self._go_to(level)
        try:
            yield
        finally:
            self._go_to(now)

    @property
    def mode(self) -> str:
        """``exact`` or ``dni``: that of the current level."""
        return self.levels[self.level].mode

    @override
    def groups(self, workers: int) -> list[range]:
        with self._at(len(self.levels) - 1):
            return super().groups(workers)

    @override
    def schedule(self, workers: int) -> str:
        with self._at(len(self.levels) - 1):
            groups, times = self.groups(workers), self.stage_times()
            lags = dict.fromkeys(None if level.mode == "exact" else self.lag for level in self.levels)
            return "\n\n".join(schedule_grid(groups, times, lag) for lag in lags)

    @override
    def describe(self) -> str:
        epochs = [*self.first_epochs, self.trainer.max_epochs or 0]
        parts = []
        for k, level in enumerate(self.levels):
            with self._at(k):
                rate = "" if level.lr is None else f", rate {level.lr:g}"
                span = f"{epochs[k + 1] - epochs[k]} epochs"
                parts.append(f"{self.spec.total_steps} steps, {level.mode}{rate}, {span}")
        return f"{super().describe()}; from coarse to fine: {'; '.join(parts)}"

    @property
    def first_epochs(self) -> list[int]:
        """The epoch with which each level begins; a dev run goes through all of them at once."""
        trainer: Any = self.trainer
        if trainer.fast_dev_run:
            return [0] * len(self.levels)
        return first_epochs(self.levels, self.trainer.max_epochs or 0)

    @override
    def on_fit_start(self) -> None:
        _ = self.first_epochs  # refuses what does not add up

    @override
    def on_train_start(self) -> None:
        # A training that goes on in mid-epoch has no start of it.
        self._clocks = perf_counter(), process_time()

    @override
    def on_train_epoch_start(self) -> None:
        self._clocks = perf_counter(), process_time()
        if not self.history:
            self._begin_level({})
        while self.level < bisect_right(self.first_epochs, self.current_epoch) - 1:
            self.refine()
        super().on_train_epoch_start()

    def refine(self) -> None:
        """Go on with twice the steps: stages, their optimisers and all schedules; estimators stay as they are."""
        before = self._validation_loss()
        coarse, schedulers = dict(self.own_stages()), self.schedulers()
        states: list[State] = [optimizer.state_dict()["state"] for optimizer in self._optimizers()]
        heads = self._heads(coarse, states)
        self._go_to(self.level + 1)
        for i, stage in coarse.items():
            self.stages[str(i)] = stage.refine(self.prolongation, heads.get(i + 1))
        # Makes new ones, and tells Lightning.
        self.trainer.strategy.setup_optimizers(self.trainer)
        for (i, stage), k in zip(coarse.items(), range(len(states)), strict=False):
            states[k] = self._prolonged(states[k], stage, heads.get(i + 1, {}))
        for optimizer, state in zip(self._optimizers(), states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        for scheduler, earlier in zip(self.schedulers(), schedulers, strict=True):
            go_on(scheduler, earlier)
        self._begin_level({"loss_before": before, "loss_after": self._validation_loss()})

    def _optimizers(self) -> list[Optimizer]:
        """All optimisers, without Lightning's wrappers; the stages' first."""
        return list(self.trainer.strategy.optimizers)

    def _heads(self, stages: Mapping[int, Stage], states: Sequence[State]) -> dict[int, dict[str, Tensor]]:
        """Of all stages that begin within a segment, wherever they live: first samples, also of the moments."""
        own: dict[int, dict[str, Tensor]] = {}
        for (i, stage), state in zip(stages.items(), states, strict=False):
            head = stage.head()
            moments = {
                f"{n}/{kind}": value[0].clone() for n, kind, value in _moments(stage, state) if n in head
            }
            own[i] = head | moments
        return dict(ChainMap(*self.placement.peers.share(own)))

    def _prolonged(self, state: State, stage: Stage, following: Mapping[str, Tensor]) -> State:
        """An optimiser's state for a refined stage."""
        if self.moments == "reset":
            return {}
        fine = {k: dict(values) for k, values in state.items()}
        numbers = {name: k for k, (name, _) in enumerate(stage.named_parameters())}
        for name, kind, value in _moments(stage, state):
            if name.startswith("segments."):
                samples = prolong(value, self.prolongation, following.get(f"{name}/{kind}"))
                fine[numbers[name]][kind] = MOMENTS[kind] * samples
        return fine

    def _begin_level(self, losses: Mapping[str, float | None]) -> None:
        """Open the history of the current level, with the validation losses around its refinement."""
        known = {name: loss for name, loss in losses.items() if loss is not None}
        self.log_dict({f"refinement/{name}": loss for name, loss in known.items()})
        clocks = {"epochs": 0, "fit_s": 0.0, "cpu_s": 0.0}
        self.history.append({"steps": self.spec.total_steps, **clocks, **known})

    @torch.no_grad()
    def _validation_loss(self) -> float | None:
        """Mean loss over the validation data, now; None without such data."""
        trainer: Any = self.trainer
        loader, limits = trainer.val_dataloaders, trainer.num_val_batches
        if not loader or not sum(limits):
            return None
        self.eval()
        for batch in islice(loader, None if limits[0] == inf else int(limits[0])):
            batch = trainer.precision_plugin.convert_input(batch)
            with trainer.precision_plugin.val_step_context():
                self._evaluate(trainer.strategy.batch_to_device(batch))
        self.train()
        return self._means()["loss"]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if self.mode == "dni":
            super().training_step(batch, batch_idx)
        else:
            self.exact_step(*batch)

    # To the estimators a state looks as at the coarsest level, where they have begun: leapfrog's holds a velocity as
    # a difference over h.

    @override
    def estimate(self, i: int, state: Tensor, labels: Tensor) -> Tensor:
        rule, ratio = self.spec.rule, 2**self.level
        coarse = _on_fields(rule.restepped, state, rule.fields, ratio)
        return _on_fields(
            rule.restepped_gradient, super().estimate(i, coarse, labels), rule.fields, 1 / ratio
        )

    @override
    def teach(self, i: int, state: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        rule, ratio = self.spec.rule, 2**self.level
        coarse = _on_fields(rule.restepped, state, rule.fields, ratio)
        return super().teach(
            i, coarse, labels, _on_fields(rule.restepped_gradient, target, rule.fields, ratio)
        )

    def exact_step(self, x: Tensor | None, labels: Tensor) -> None:
        """All stages forward, then back with true gradients, which the estimators learn from a batch later.

        So lessons fill the time in which a stage waits for the gradient of the next batch.
        """
        t, count, phase = self.begin_batch(labels), len(labels), self.recorder.phase
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        known: dict[str, Tensor] = {}
        is_due = self._is_diagnosis_due()
        for i in self.placement.own:
            inputs[i] = self.enter(i, x, count)
            if i > 0:
                inputs[i].requires_grad_()
            with phase("forward", i):
                outputs[i] = self.stage(i)(inputs[i])
            if i < self.last:
                self.hand_on(i, outputs[i].detach())
        self.learn(t - 1)
        for i in reversed(self.placement.own):
            gradient, state = None, outputs[i].detach()
            if i < self.last:
                gradient = self.true_gradient(i, count)
                if is_due:
                    estimate = self.estimate(i, state, labels)
                    known |= {f"estimator_{i}/{k}": v for k, v in compare(estimate, gradient).items()}
                if self.is_lesson(t):
                    # Still valid a batch later: the next gradient is received behind the lesson.
                    self.waiting[i].append((t, state, labels))
                    self.received[i].append(gradient)
            with phase("backward", i):
                if i == self.last:
                    outputs[i] = F.cross_entropy(outputs[i], labels, reduction="sum")
                    self.record(outputs[i], state, labels)
                outputs[i].backward(gradient)
            if i > 0:
                upwards = inputs[i].grad
                assert upwards is not None
                self.hand_back(i, upwards)
            with phase("backward", i):
                self.update(i, count)
        if self.trainer.is_last_batch:
            self.drain()
        self.end_batch({**known, **{f"estimator_{i}/loss": loss for i, loss in self.losses.items()}})

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        means = self.trainer.callback_metrics
        if self.trainer.sanity_checking or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self.history[-1] |= {f"val_{name}": float(means[f"val/{name}"]) for name in ("loss", "acc")}

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        wall, cpu = perf_counter() - self._clocks[0], process_time() - self._clocks[1]
        now = self.history[-1]
        now["epochs"] += 1
        now["fit_s"] += wall
        now["cpu_s"] += self.placement.peers.total([cpu]).result()[0]
        self.log("level", float(self.level), prog_bar=True)

    @override
    def theoretical_speedup(self, times: Sequence[StageTimes]) -> float:
        lag = self.lag if self.mode == "dni" else None
        return group_speedup([range(i, i + 1) for i in range(len(times))], times, lag)

    @override
    def results(self) -> dict[str, float]:
        return {f"level_{k}/{name}": v for k, facts in enumerate(self.history) for name, v in facts.items()}

    @override
    def identity(self) -> dict[str, Any]:
        with self._at(len(self.levels) - 1):
            return {**super().identity(), "strategy.levels": len(self.levels)}

    @override
    def progress(self) -> dict[str, Any]:
        return {**super().progress(), "level": self.level, "history": self.history}

    @override
    def go_on_from(self, progress: Mapping[str, Any]) -> None:
        super().go_on_from(progress)
        self.history = [dict(facts) for facts in progress["history"]]
        if progress["level"] != self.level:
            self._go_to(progress["level"])
            for i, stage in dict(self.own_stages()).items():
                example = next(stage.parameters())
                other = Stage(self.spec, *self.cuts[i : i + 2]).to(example.device, example.dtype)
                self.stages[str(i)] = other.train(stage.training)


def _moments(stage: Stage, state: State) -> Iterator[tuple[str, str, Tensor]]:
    """Name of the parameter, kind and value of all moments in an optimiser's state."""
    for k, (name, _) in enumerate(stage.named_parameters()):
        for kind, value in state.get(k, {}).items():
            if kind in MOMENTS and value is not None:
                yield name, kind, value


def _on_fields(
    change: Callable[[tuple[Tensor, ...], float], tuple[Tensor, ...]],
    state: Tensor,
    fields: int,
    ratio: float,
) -> Tensor:
    """``change`` for a state whose fields are joined along the channels."""
    parts = state.chunk(fields, 1)
    changed = change(parts, ratio)
    return state if changed is parts or ratio == 1 else torch.cat(changed, 1)
