"""Decoupled neural interfaces: stages learn from synthetic gradients and do not wait for each other.

Jaderberg et al. 2017. For batch t, stage i with parameters theta_i and the estimator SG_i at its end:

    h_i = stage_i(h_{i-1})                     handed on, detached
    d_i = SG_i(h_i, y)                         the last stage has the loss's own gradient instead
    theta_i <- optimiser(theta_i, J_i^T d_i)   and dL/dh_{i-1} goes back to stage i - 1
    SG_i learns from (h_i, y, dL/dh_i) of batch t - lag
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from sglight.gradients import (
    Estimator,
    SyntheticGradient,
    prediction_cost,
    prediction_values,
    synthetic_gradient,
)
from sglight.networks.network import ELEMENTWISE, ExtraCost
from sglight.networks.parts import Shape
from sglight.strategies.base import TIMED_EVERY, Batch, StagedModule
from sglight.strategies.grid import schedule_grid
from sglight.strategies.optim import make_optimizer
from sglight.strategies.schedule import StageTimes, speedup

# A batch number, and its state and labels, whose true gradient is still to come.
Waiting = tuple[int, Tensor, Tensor]


class DNI(StagedModule):
    """M stages, estimators at the M - 1 boundaries; arguments as in `StagedModule`, and

    Args:
        stages: M, from 1 to the number of steps.
        lag: how many batches old the true gradient is from which an estimator learns.
        estimator: ``name, hidden, conditional, kernel_size, every_n_batches, optimizer``.
        diagnose_every_n_batches: least number of batches between two comparisons of synthetic and true gradients,
            each at the cost of one locked pass; 0 for never.
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
    ) -> None:
        self.estimator_config = {**_ESTIMATOR, **dict(estimator or {})}
        super().__init__(network, optimizer, scheduler, clip_norm, regularisation, stages)
        if lag < 0:
            raise ValueError(f"strategy.lag={lag} must be 0 (wait for the true gradient) or more")
        self.lag = lag
        self.diagnose_every_n_batches = diagnose_every_n_batches
        self.estimators = nn.ModuleDict()
        # By boundary, oldest first: states to learn from, and of these the gradients that have been received already.
        self.waiting: dict[int, deque[Waiting]] = {i: deque() for i in range(self.last)}
        self.received: dict[int, deque[Tensor]] = {i: deque() for i in range(self.last)}
        self.losses: dict[int, Tensor] = {}
        self._next_diagnosis = 0

    @override
    def extra_cost(self) -> ExtraCost:
        c = self.estimator_config
        # In units of a stage's forward + backward, 3 passes: one prediction a batch, one lesson in every n.
        passes = (1 + 3 / c["every_n_batches"]) / 3

        def work(shape: Shape) -> float:
            cost = prediction_cost(c["name"], shape, c["hidden"], c["kernel_size"])
            return passes * (cost + ELEMENTWISE * prediction_values(c["name"], shape, c["hidden"]))

        return work

    def make_estimator(self, i: int) -> Estimator:
        """The estimator at the boundary behind stage i; override this for another kind."""
        c, position = self.estimator_config, self.cuts[i + 1]
        return synthetic_gradient(
            c["name"], self.spec.state_shape(position), self.spec.classes, c["hidden"], c["conditional"],
            c["kernel_size"], self.spec.seed, "estimators", position,
        )  # fmt: skip

    @override
    def configure_model(self) -> None:
        super().configure_model()
        for i in self.boundaries:
            if str(i) not in self.estimators:
                self.estimators[str(i)] = self.make_estimator(i)

    @override
    def parts(self) -> list[nn.ModuleDict]:
        return [*super().parts(), self.estimators]

    @override
    def describe(self) -> str:
        c = self.estimator_config
        kind = f"{c['name']} estimators" + (" that see the label" if c["conditional"] else "")
        return f"{super().describe()}; {len(self.cuts) - 1} stages, lag {self.lag}, {kind}"

    @override
    def parameter_counts(self) -> dict[str, int]:
        counts = {
            f"estimator_{k}": sum(p.numel() for p in e.parameters()) for k, e in self.estimators.items()
        }
        return {**super().parameter_counts(), **counts}

    @property
    def boundaries(self) -> list[int]:
        """The boundaries whose estimators live here: with the stage before them."""
        return [i for i in self.placement.own if i < self.last]

    @override
    def schedule(self, workers: int) -> str:
        return schedule_grid(self.groups(workers), self.stage_times(), self.lag)

    def stage_times(self) -> list[StageTimes]:
        """The phases of each stage by the cost model, in multiplications a sample."""
        cuts, extra = self.cuts, self.extra_cost()
        stages = self.spec.stage_work(cuts)
        both = self.spec.stage_work(cuts, extra)
        learns = self.estimator_config["every_n_batches"]
        # Of what an estimator does, one pass is the estimate and 3 / n are lessons.
        parts = [(w, (b - w) * 3 / (1 + 3 / learns)) for w, b in zip(stages, both, strict=True)]
        return [StageTimes(work, e, 2 * work, 3 * e / learns) for work, e in parts]

    @property
    @override
    def in_flight(self) -> int:
        # A stage is at most lag + 1 batches ahead of the next, which may hold one tensor more.
        return self.lag + 2

    def estimator(self, i: int) -> Estimator:
        """The estimator behind stage i."""
        return self.estimators[str(i)]  # type: ignore[return-value]

    def estimate(self, i: int, state: Tensor, labels: Tensor) -> Tensor:
        """The synthetic gradient at the boundary behind stage i."""
        return self.estimator(i).estimate(state, labels, self.time(i))

    def teach(self, i: int, state: Tensor, labels: Tensor, target: Tensor) -> Tensor:
        """A lesson for the estimator behind stage i; returns its loss."""
        return self.estimator(i).learn(state, labels, target, self.time(i))

    def time(self, i: int) -> float:
        """Network time of the boundary behind stage i."""
        return self.spec.time(self.cuts[i + 1])

    @override
    def make_optimizers(self) -> list[tuple[str, Optimizer]]:
        optimizers = super().make_optimizers()
        for key, estimator in self.estimators.items():
            if isinstance(estimator, SyntheticGradient):
                estimator.optimizer = make_optimizer(
                    self.estimator_config["optimizer"], estimator.parameters()
                )
                optimizers.append((f"estimator_{key}", estimator.optimizer))
        return optimizers

    @override
    def optimizer_names(self) -> list[str]:
        learning = [k for k, e in self.estimators.items() if isinstance(e, SyntheticGradient)]
        return [*super().optimizer_names(), *(f"estimator_{k}" for k in learning)]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, labels = batch
        t = self.begin_batch(labels)
        diagnosis = self.diagnose(x, labels) if self._is_diagnosis_due() else {}
        for i in self.placement.own:
            self.train_stage(i, x, labels, t)
        self.learn(t - self.lag)
        if self.trainer.is_last_batch:
            self.drain()
        self.end_batch({**diagnosis, **{f"estimator_{i}/loss": loss for i, loss in self.losses.items()}})

    def begin_batch(self, labels: Tensor) -> int:
        """Tell the recorder; returns the batch's number from the beginning of the training."""
        # Not Lightning's index, which repeats the last one when a training goes on in mid-epoch.
        t = self.global_step
        # As many batches in a row are timed as there are to a lesson, so that one of them has it whatever the lag.
        timed = t % TIMED_EVERY < self.estimator_config["every_n_batches"]
        self.recorder.begin(t, timed, labels.is_cuda)
        return t

    def is_lesson(self, t: int) -> bool:
        """Whether the estimators learn from batch t, counted from the beginning of the training."""
        return bool(t % self.estimator_config["every_n_batches"] == 0)

    def train_stage(self, i: int, x: Tensor | None, labels: Tensor, t: int) -> None:
        """Forward, estimate, backward and update of one stage."""
        lesson, phase = self.is_lesson(t), self.recorder.phase
        state = self.enter(i, x, len(labels))
        if i > 0 and lesson:
            state.requires_grad_()
        with phase("forward", i):
            output = self.stage(i)(state)
        handed_on, gradient = output.detach(), None
        if i < self.last:
            self.hand_on(i, handed_on)
            with phase("estimate", i):
                gradient = self.estimate(i, handed_on, labels)
            if lesson:
                self.waiting[i].append((t, handed_on, labels))
        with phase("backward", i):
            if i == self.last:
                output = F.cross_entropy(output, labels, reduction="sum")
                self.record(output, handed_on, labels)
            output.backward(gradient)
        if i > 0 and lesson:
            assert state.grad is not None
            self.hand_back(i, state.grad)
        with phase("backward", i):
            self.update(i, len(labels))

    def learn(self, until: int) -> None:
        """Train the estimators here on the gradients of all batches up to ``until`` that they have not seen yet."""
        for i in self.boundaries:
            while self.waiting[i] and self.waiting[i][0][0] <= until:
                _, state, labels = self.waiting[i].popleft()
                target = (
                    self.received[i].popleft() if self.received[i] else self.true_gradient(i, len(labels))
                )
                with self.recorder.phase("learn", i):
                    self.losses[i] = self.teach(i, state, labels, target)

    def true_gradient(self, i: int, count: int) -> Tensor:
        """The next gradient that comes up through the boundary behind stage i."""
        with self.recorder.phase("wait", i):
            return self.placement.gradients[i].receive(self.boundary_shape(i, count))

    def drain(self) -> None:
        """Learn from all gradients that are still to come, oldest first."""
        for t in sorted({t for states in self.waiting.values() for t, *_ in states}):
            self.learn(t)

    def collect(self) -> None:
        """Receive all gradients that are on their way, without learning from them yet."""
        for i in self.boundaries:
            for _, _, labels in list(self.waiting[i])[len(self.received[i]) :]:
                self.received[i].append(self.true_gradient(i, len(labels)).clone())

    @override
    def curve_names(self) -> list[str]:
        kinds = ("loss", *COMPARED)
        return [
            *super().curve_names(),
            *(f"estimator_{i}/{kind}" for i in range(self.last) for kind in kinds),
        ]

    def _is_diagnosis_due(self) -> bool:
        """Whether to compare gradients now: in a batch that Lightning logs, and long enough after the last."""
        trainer: Any = self.trainer
        writes = (self.global_step + 1) % trainer.log_every_n_steps == 0
        every = self.diagnose_every_n_batches
        if not (every and writes and self.global_step >= self._next_diagnosis):
            return False
        self._next_diagnosis = self.global_step + every
        return True

    def diagnose(self, x: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        """How well each estimator here predicts the true gradient of this batch, before anything is updated."""
        self.collect()
        known: dict[str, Tensor] = {}
        with unchanged_statistics(self):
            inputs: dict[int, Tensor] = {}
            outputs: dict[int, Tensor] = {}
            for i, stage in self.own_stages():
                inputs[i] = self.enter(i, x, len(labels)).detach().requires_grad_()
                outputs[i] = stage(inputs[i])
                if i < self.last:
                    self.hand_on(i, outputs[i].detach())
            for i in reversed(self.placement.own):
                if i == self.last:
                    gradient, outputs[i] = None, F.cross_entropy(outputs[i], labels, reduction="sum")
                else:
                    gradient = self.true_gradient(i, len(labels))
                    estimate = self.estimate(i, outputs[i].detach(), labels)
                    known |= {f"estimator_{i}/{k}": v for k, v in compare(estimate, gradient).items()}
                if i > 0:
                    self.hand_back(i, torch.autograd.grad(outputs[i], inputs[i], gradient)[0])
        return known

    @override
    def on_train_epoch_end(self) -> None:
        # A run may end in mid-epoch (max_time, an early stop).
        self.drain()
        super().on_train_epoch_end()

    @override
    def phase_times(self) -> list[StageTimes]:
        lessons = self.estimator_config["every_n_batches"]
        return [replace(stage, learn=stage.learn / lessons) for stage in super().phase_times()]

    @override
    def log_phases(self, times: Sequence[StageTimes]) -> None:
        super().log_phases(times)
        self.log("speedup/theoretical", self.theoretical_speedup(times))

    def theoretical_speedup(self, times: Sequence[StageTimes]) -> float:
        """How many times faster a worker for each stage is than one for all, free messages provided."""
        return speedup(times, self.lag)

    @override
    def progress(self) -> dict[str, Any]:
        return {**super().progress(), "next_diagnosis": self._next_diagnosis}

    @override
    def go_on_from(self, progress: Mapping[str, Any]) -> None:
        super().go_on_from(progress)
        self._next_diagnosis = progress["next_diagnosis"]

    @override
    def identity(self) -> dict[str, Any]:
        shape = {f"strategy.estimator.{key}": self.estimator_config[key] for key in _SHAPING}
        return {**super().identity(), **shape}

    @override
    def training_identity(self) -> dict[str, Any]:
        name = self.estimator_config["optimizer"]["name"]
        return {**super().training_identity(), "strategy.estimator.optimizer.name": name}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.collect()
        checkpoint["waiting"] = {
            # A view of a channel's memory would be saved with all of it.
            f"estimator_{i}": (list(self.waiting[i]), [gradient.clone() for gradient in self.received[i]])
            for i in self.boundaries
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for i in self.boundaries:
            waiting, received = checkpoint["waiting"][f"estimator_{i}"]
            self.waiting[i], self.received[i] = deque(map(tuple, waiting)), deque(received)


# What shapes an estimator's parameters.
_SHAPING = ("name", "hidden", "conditional", "kernel_size")
_ESTIMATOR: dict[str, Any] = {
    "name": "mlp",
    "hidden": [64],
    "conditional": True,
    "kernel_size": 3,
    "every_n_batches": 1,
    "optimizer": {"name": "adam", "lr": 1e-3},
}


COMPARED = ("cosine", "relative_error", "norm_ratio", "sign_agreement")


def compare(estimate: Tensor, true: Tensor) -> dict[str, Tensor]:
    """How two gradients ``[B, ...]`` agree.

    Mean cosine over the batch, relative error of the whole, ratio of the norms, share of entries with the same sign.
    """
    e, t = estimate.flatten(1), true.flatten(1)
    cosine = F.cosine_similarity(e, t, dim=1).mean()
    same = (e.sign() == t.sign()).to(e.dtype).mean()
    return dict(zip(COMPARED, (cosine, (e - t).norm() / t.norm(), e.norm() / t.norm(), same), strict=True))


@contextmanager
def unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Run forward passes in training mode without a trace in the running statistics."""
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in module.named_buffers():
            buffer.copy_(kept[name])
