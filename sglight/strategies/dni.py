"""Decoupled neural interfaces: stages learn from synthetic gradients and do not wait for each other.

Jaderberg et al. 2017. For batch t, stage i with parameters theta_i and the estimator SG_i at its end:

    h_i = stage_i(h_{i-1})                     handed on, detached
    d_i = SG_i(h_i, y)                         the last stage has the loss's own gradient instead
    theta_i <- optimiser(theta_i, J_i^T d_i)   and dL/dh_{i-1} goes back to stage i - 1
    SG_i learns from (h_i, y, dL/dh_i) of batch t - lag
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from sglight.estimators import Estimator, SyntheticGradient, prediction_cost, synthetic_gradient
from sglight.networks import Stage
from sglight.networks.network import ExtraCost
from sglight.strategies.base import Batch, StagedModule
from sglight.strategies.optim import make_optimizer
from sglight.strategies.schedule import StageClock, speedup

# Of so many batches the phases of the first are timed.
TIMED_EVERY = 5


class Boundary:
    """What waits at a boundary: states whose true gradient is still to come, and gradients not yet learnt from."""

    def __init__(self) -> None:
        self.states: deque[tuple[int, Tensor, Tensor]] = deque()
        self.gradients: deque[Tensor] = deque()

    def due(self, lag: int) -> bool:
        """Whether there is a gradient more than the lag allows to wait."""
        return len(self.gradients) > lag

    def take(self) -> tuple[int, Tensor, Tensor, Tensor]:
        """The oldest batch index, state, labels and true gradient."""
        return *self.states.popleft(), self.gradients.popleft()


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
        self.boundaries = [Boundary() for _ in range(stages - 1)]
        self.clocks = [StageClock() for _ in range(stages)]
        self.is_timed = False
        self.losses: dict[int, Tensor] = {}
        self._next_diagnosis = 0

    @override
    def extra_cost(self) -> ExtraCost:
        c = self.estimator_config
        # In units of a stage's forward + backward, 3 passes: one prediction a batch, one lesson in every n.
        passes = (1 + 3 / c["every_n_batches"]) / 3
        return lambda shape: passes * prediction_cost(c["name"], shape, c["hidden"], c["kernel_size"])

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
        for i, _ in self.own_stages():
            if i < self.last and str(i) not in self.estimators:
                self.estimators[str(i)] = self.make_estimator(i)

    @override
    def describe(self) -> str:
        c = self.estimator_config
        kind = f"{c['name']} estimators" + (" that see the label" if c["conditional"] else "")
        return f"{super().describe()}; {len(self.cuts) - 1} stages, lag {self.lag}, {kind}"

    @override
    def estimator_parameters(self, i: int) -> int:
        return sum(p.numel() for p in self.estimator(i).parameters()) if str(i) in self.estimators else 0

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return len(self.cuts) - 2

    def estimator(self, i: int) -> Estimator:
        """The estimator behind stage i."""
        return self.estimators[str(i)]  # type: ignore[return-value]

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
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, labels = batch
        if self._is_diagnosis_due():
            self.diagnose(x, labels)
        # As many batches in a row as there are to a lesson, so that one of them has it whatever the lag.
        self.is_timed = batch_idx % TIMED_EVERY < self.estimator_config["every_n_batches"]
        state = x
        for i, stage in self.own_stages():
            state = self.train_stage(i, stage, state, labels, batch_idx)
        for i, boundary in enumerate(self.boundaries):
            if boundary.due(self.lag):
                self.learn(i)
        if self.trainer.is_last_batch:
            self.drain()
        if self.is_logging:
            for i, loss in self.losses.items():
                self.log(f"estimator_{i}/loss", loss)

    def train_stage(self, i: int, stage: Stage, state: Tensor, labels: Tensor, batch_idx: int) -> Tensor:
        """Forward, estimate, backward and update of one stage; returns the detached output."""
        clock = self.clocks[i]
        clock.start(self.is_timed, state)
        if i > 0:
            state = state.requires_grad_()
        output = stage(state)
        handed_on = output.detach()
        clock.lap("forward")
        gradient = None
        if i == self.last:
            output = F.cross_entropy(output, labels, reduction="sum")
        else:
            gradient = self.estimator(i).estimate(handed_on, labels, self.time(i))
            self.boundaries[i].states.append((batch_idx, handed_on, labels))
            clock.lap("estimate")
        self.descend(i, output, gradient, len(labels))
        if i > 0:
            assert state.grad is not None
            self.boundaries[i - 1].gradients.append(state.grad)
        clock.lap("backward")
        if i == self.last:
            self.record(output, handed_on, labels)
        # A tensor of its own: the next stage asks for its gradient.
        return handed_on.detach()

    def learn(self, i: int) -> None:
        """Train the estimator behind stage i on the oldest gradient that waits there."""
        batch_idx, state, labels, target = self.boundaries[i].take()
        if batch_idx % self.estimator_config["every_n_batches"] == 0:
            self.clocks[i].start(self.is_timed, state)
            self.losses[i] = self.estimator(i).learn(state, labels, target, self.time(i))
            self.clocks[i].lap("learn")

    def drain(self) -> None:
        """Learn from all gradients that still wait, oldest first."""
        for i, boundary in enumerate(self.boundaries):
            while boundary.due(0):
                self.learn(i)

    def _is_diagnosis_due(self) -> bool:
        """Whether to compare gradients now: in a batch that Lightning logs, and long enough after the last."""
        trainer: Any = self.trainer
        writes = (self.global_step + 1) % trainer.log_every_n_steps == 0
        every = self.diagnose_every_n_batches
        if not (every and writes and self.global_step >= self._next_diagnosis):
            return False
        self._next_diagnosis = self.global_step + every
        return True

    def diagnose(self, x: Tensor, labels: Tensor) -> None:
        """Log how well each estimator predicts the true gradient of this batch, before anything is updated."""
        with unchanged_statistics(self):
            inputs, outputs = [], []
            for _, stage in self.own_stages():
                inputs.append(x.detach().requires_grad_())
                x = stage(inputs[-1])
                outputs.append(x)
            gradient = None
            outputs[-1] = F.cross_entropy(x, labels, reduction="sum")
            for i in reversed(range(self.last)):
                (gradient,) = torch.autograd.grad(outputs[i + 1], inputs[i + 1], gradient)
                estimate = self.estimator(i).estimate(inputs[i + 1].detach(), labels, self.time(i))
                for name, value in compare(estimate, gradient).items():
                    self.log(f"estimator_{i}/{name}", value)

    @override
    def on_train_epoch_end(self) -> None:
        # A run may end in mid-epoch (max_time, an early stop).
        self.drain()
        times = [clock.typical() for clock in self.clocks]
        for clock in self.clocks:
            clock.clear()
        if not all(stage.total for stage in times):
            return  # resumed behind the last batch that is timed
        for stage in times:
            stage.learn /= self.estimator_config["every_n_batches"]
        self.log("speedup/theoretical", speedup(times, self.lag))
        for i, stage in enumerate(times):
            for phase, seconds in vars(stage).items():
                self.log(f"time/stage_{i}/{phase}_s", seconds)

    @override
    def identity(self) -> dict[str, Any]:
        shape = {f"strategy.estimator.{key}": self.estimator_config[key] for key in _SHAPING}
        return {**super().identity(), **shape}

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["waiting"] = [(list(b.states), list(b.gradients)) for b in self.boundaries]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for boundary, (states, gradients) in zip(self.boundaries, checkpoint["waiting"], strict=True):
            boundary.states, boundary.gradients = deque(map(tuple, states)), deque(gradients)


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


def compare(estimate: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Mean cosine over the batch, relative error of the whole, and ratio of the norms of two gradients ``[B, ...]``."""
    e, t = estimate.flatten(1), true.flatten(1)
    return {
        "cosine": F.cosine_similarity(e, t, dim=1).mean(),
        "relative_error": (e - t).norm() / t.norm(),
        "norm_ratio": e.norm() / t.norm(),
    }


@contextmanager
def unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Run forward passes in training mode without a trace in the running statistics."""
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in module.named_buffers():
            buffer.copy_(kept[name])
