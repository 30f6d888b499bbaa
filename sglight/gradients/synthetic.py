"""Synthetic gradients as a gradient source: an estimator at each boundary predicts the gradient, and learns later.

Jaderberg et al. 2017. With h the state after a stage, y the labels and SG the estimator at the boundary:

    d = SG(h, y)                         the stage uses it instead of dL/dh
    SG learns from (h, y, dL/dh)         when the next stage has sent dL/dh
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from sglight.config.schema import OptimizerConfig, default_estimator
from sglight.config.settings import settings
from sglight.gradients.base import Boundary, GradientSource, Passage
from sglight.gradients.estimators import (
    READY_MADE,
    Estimator,
    SyntheticGradient,
    prediction_cost,
    prediction_values,
    shares_lessons,
    synthetic_gradient,
)
from sglight.gradients.heads import Criterion, Head, head_multiplications
from sglight.gradients.residual import ResidualGradient
from sglight.networks import NetworkSpec
from sglight.networks.dynamics import Dynamics
from sglight.networks.network import ELEMENTWISE, ExtraCost
from sglight.networks.parts import Shape

OPTIMIZER = "strategy.estimator.optimizer"  # the config key of the estimators' optimiser
POOL = 4  # the size to which images are averaged for the head of a residual estimator


@dataclass(frozen=True)
class Restepped:
    """Converts states and gradients to the step size of the coarsest level, at which estimators have begun to learn.

    In a multilevel training the step size h changes. The state of leapfrog contains y_prev, that is a velocity times
    h, which would look different to an estimator.

    Args:
        rule: the dynamics.
        ratio: the step size of the coarsest level, divided by the present one.
    """

    rule: Dynamics
    ratio: float

    def state(self, state: Tensor) -> Tensor:
        """A state as the estimator gets it."""
        return self._changed(self.rule.restepped, state, self.ratio)

    def target(self, gradient: Tensor) -> Tensor:
        """A true gradient as the estimator gets it."""
        return self._changed(self.rule.restepped_gradient, gradient, self.ratio)

    def gradient(self, estimate: Tensor) -> Tensor:
        """An estimated gradient converted back to the present step size."""
        return self._changed(self.rule.restepped_gradient, estimate, 1 / self.ratio)

    def _changed(
        self, change: Callable[[tuple[Tensor, ...], float], tuple[Tensor, ...]], state: Tensor, ratio: float
    ) -> Tensor:
        """Applies ``change`` to a state whose fields are joined along the channels."""
        parts = state.chunk(self.rule.fields, 1)
        changed = change(parts, ratio)
        return state if changed is parts or ratio == 1 else torch.cat(changed, 1)


@dataclass(frozen=True)
class Synthetic(GradientSource):
    """Gradients predicted by an estimator at each boundary.

    Args:
        name: ``linear``, ``mlp``, ``conv`` or ``package.module.Class``.
        hidden: the widths of its hidden layers.
        conditional: whether it uses the labels.
        kernel_size: of its convolutions.
        every_n_batches: it learns from every n-th batch.
        residual: whether it is a `ResidualGradient`.
        criterion: the loss of the head of a residual estimator.
        optimizer: of the estimators, see `sglight.strategies.optim`.
        restepped: converts states in a multilevel training; None for no conversion.
    """

    name: str = "mlp"
    hidden: Sequence[int] = (64,)
    conditional: bool = True
    kernel_size: int = 3
    every_n_batches: int = 1
    residual: bool = False
    criterion: Criterion | None = None
    optimizer: Mapping[str, Any] = field(default_factory=lambda: settings(OptimizerConfig, None, OPTIMIZER))
    restepped: Restepped | None = None
    predicts: ClassVar[bool] = True

    @classmethod
    def of(
        cls, config: Mapping[str, Any] | None, kernel: str = "dense", criterion: Criterion | None = None
    ) -> Synthetic:
        """The source for the config section ``strategy.estimator``, completed by its defaults.

        Raises:
            ValueError: for a key or an optimiser that does not exist.
        """
        known = {f.name for f in fields(cls)} - {"restepped", "criterion"}
        for key in config or {}:
            if key not in known:
                raise ValueError(
                    f"strategy.estimator.{key} is unknown; choose among {', '.join(sorted(known))}"
                )
        found = {"name": str(default_estimator(kernel)), **(config or {})}
        optimizer = settings(OptimizerConfig, found.get("optimizer"), OPTIMIZER)
        source = cls(**{**found, "optimizer": optimizer, "criterion": criterion})
        if source.residual and source.name not in READY_MADE:
            raise ValueError(
                f"strategy.estimator.residual=true is for {', '.join(READY_MADE)}, not {source.name}; leave it out"
            )
        return source

    @property
    @override
    def lesson_every(self) -> int:  # type: ignore[override]
        return self.every_n_batches

    @property
    @override
    def learns_together(self) -> bool:  # type: ignore[override]
        return shares_lessons(self.name)

    @override
    def wants(self, batch: int) -> bool:
        return batch % self.every_n_batches == 0

    @override
    def gradient(self, boundary: Boundary, passage: Passage, true: Tensor | None) -> Tensor:
        return self.estimate(boundary, passage)

    @override
    def estimate(self, boundary: Boundary, passage: Passage) -> Tensor:
        view, state = self.restepped, passage.state
        if view is None:
            return boundary.estimator.estimate(state, passage.labels, boundary.time)
        return view.gradient(boundary.estimator.estimate(view.state(state), passage.labels, boundary.time))

    @override
    def learn(self, boundary: Boundary, passage: Passage) -> Tensor:
        view, state, target = self.restepped, passage.state, passage.target
        assert target is not None
        if view is not None:
            state, target = view.state(state), view.target(target)
        return boundary.estimator.learn(state, passage.labels, target, boundary.time)

    @override
    def make_estimator(self, spec: NetworkSpec, cuts: Sequence[int], stage: int) -> Estimator:
        position = cuts[stage + 1]
        shape = spec.state_shape(position)
        estimator = synthetic_gradient(
            self.name, shape, spec.classes, self.hidden, self.conditional, self.kernel_size,
            spec.seed, "estimators", position,
        )  # fmt: skip
        if not self.residual:
            return estimator
        assert isinstance(estimator, SyntheticGradient) and self.criterion is not None
        seen = (shape[0] // spec.rule.fields, *shape[1:])
        head = Head(
            self.name,
            seen,
            spec.classes,
            self.hidden,
            POOL,
            0.0,
            self.criterion,
            spec.seed,
            "heads",
            position,
        )
        return ResidualGradient(head, estimator)

    @override
    def estimator_optimizer(self) -> dict[str, Any]:
        return dict(self.optimizer)

    @override
    def passes(self) -> tuple[float, float]:
        # A prediction is one pass; a lesson is a forward and a backward pass (3) for every n-th batch. The head of a
        # residual estimator goes backward in both.
        return 2.0 if self.residual else 1.0, 3 / self.every_n_batches

    @override
    def cost(self, spec: NetworkSpec) -> ExtraCost:
        # In units of three passes: forward and backward of a stage.
        lessons = 3 / self.every_n_batches
        passes, with_classifier = (1 + lessons) / 3, (3 + lessons) / 3

        def work(shape: Shape) -> float:
            cost = prediction_cost(self.name, shape, self.hidden, self.kernel_size)
            cost = passes * (cost + ELEMENTWISE * prediction_values(self.name, shape, self.hidden))
            if not self.residual:
                return cost
            seen = (shape[0] // spec.rule.fields, *shape[1:])
            head = head_multiplications(self.name, seen, spec.classes, self.hidden, POOL, 0.0)
            return cost + with_classifier * head

        return work

    @override
    def describe(self) -> str:
        seen = " that see the label" if self.conditional else ""
        return f"{self.name} estimators{seen}{', behind classifiers' if self.residual else ''}"

    @override
    def identity(self) -> dict[str, Any]:
        shaping: dict[str, Any] = {"name": self.name, "hidden": list(self.hidden)}
        shaping |= {"conditional": self.conditional, "kernel_size": self.kernel_size}
        shaping |= {"residual": True} if self.residual else {}  # earlier checkpoints do not have this key
        return {f"strategy.estimator.{key}": value for key, value in shaping.items()}

    @override
    def training_identity(self) -> dict[str, Any]:
        return {"strategy.estimator.optimizer.name": self.optimizer["name"]}
