"""Synthetic gradients as a gradient source: an estimator at each boundary predicts the gradient, and learns later.

Jaderberg et al. 2017. With h the state after a stage, y the labels and SG the estimator at the boundary:

    d = SG(h, y)                         the stage uses it instead of dL/dh
    SG learns from (h, y, dL/dh)         when the next stage has sent dL/dh
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from sglight.config.schema import OptimizerConfig, default_estimator
from sglight.config.settings import settings
from sglight.gradients.base import Boundary, GradientSource, Passage
from sglight.gradients.estimators import (
    READY_MADE,
    Estimator,
    SyntheticGradient,
    fitting,
    prediction_cost,
    prediction_values,
    shares_lessons,
    synthetic_gradient,
)
from sglight.gradients.heads import Criterion, Head, head_multiplications
from sglight.gradients.residual import ResidualGradient
from sglight.gradients.restepped import UNCHANGED, Restepped
from sglight.gradients.sobolev import SobolevGradient
from sglight.networks import NetworkSpec
from sglight.networks.network import ELEMENTWISE, ExtraCost
from sglight.networks.parts import Shape

OPTIMIZER = "strategy.estimator.optimizer"  # the config key of the estimators' optimiser
# The forms of an estimator: (passes of a prediction, of a lesson)
PASSES = {"direct": (1.0, 3.0), "residual": (2.0, 3.0), "sobolev": (2.0, 6.0)}
POOL = 4  # the size to which images are averaged for a classifier


@dataclass(frozen=True)
class Synthetic(GradientSource):
    """Gradients predicted by an estimator at each boundary.

    Args:
        name: ``linear``, ``mlp``, ``conv`` or ``package.module.Class``.
        hidden: the widths of its hidden layers.
        conditional: whether it uses the labels.
        kernel_size: of its convolutions.
        every_n_batches: it learns from every n-th batch.
        form: ``direct``, ``residual`` (see `ResidualGradient`) or ``sobolev`` (see `SobolevGradient`).
        criterion: the loss of the classifiers of the last two.
        optimizer: of the estimators, see `sglight.strategies.optim`.
        restepped: converts states in a multilevel training.
    """

    name: str = "mlp"
    hidden: Sequence[int] = (64,)
    conditional: bool = True
    kernel_size: int = 3
    every_n_batches: int = 1
    form: str = "direct"
    criterion: Criterion | None = None
    optimizer: Mapping[str, Any] = field(default_factory=lambda: settings(OptimizerConfig, None, OPTIMIZER))
    restepped: Restepped = UNCHANGED
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
        if source.form not in PASSES:
            raise ValueError(
                f"strategy.estimator.form={source.form} is unknown; choose {' or '.join(PASSES)}"
            )
        if source.form != "direct" and source.name == "conv" and not source.hidden:
            raise ValueError(
                f"strategy.estimator.hidden=[] leaves estimator.form={source.form} without convolutions; give widths"
            )
        if source.form != "direct" and source.name not in READY_MADE:
            raise ValueError(
                f"strategy.estimator.form={source.form} is for {', '.join(READY_MADE)}, not {source.name}; leave it out"
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
        state = self.restepped.state(passage.state)
        return self.restepped.gradient(boundary.estimator.estimate(state, passage.labels, boundary.time))

    @override
    def learn(self, boundary: Boundary, passage: Passage) -> Tensor:
        assert passage.target is not None
        state, target = self.restepped.state(passage.state), self.restepped.target(passage.target)
        return boundary.estimator.learn(state, passage.labels, target, boundary.time)

    @override
    def make_estimator(self, spec: NetworkSpec, cuts: Sequence[int], stage: int) -> Estimator:
        position = cuts[stage + 1]
        shape = fitting(self.name, spec.state_shape(position), "estimator")
        if self.form == "sobolev":
            return SobolevGradient(self._head(spec, shape, position))
        estimator = synthetic_gradient(
            self.name, shape, spec.classes, self.hidden, self.conditional, self.kernel_size,
            spec.seed, "estimators", position,
        )  # fmt: skip
        if self.form == "direct":
            return estimator
        assert isinstance(estimator, SyntheticGradient)
        return ResidualGradient(self._head(spec, shape, position), estimator)

    def _head(self, spec: NetworkSpec, shape: Shape, position: int) -> Head:
        assert self.criterion is not None
        return Head(
            self.name, shape, spec.classes, self.hidden, POOL, 0.0, self.criterion, spec.seed, "heads", position,
        )  # fmt: skip

    @override
    def estimator_optimizer(self) -> dict[str, Any]:
        return dict(self.optimizer)

    @override
    def passes(self) -> tuple[float, float]:
        # A prediction is one pass, or two through a classifier: forward and backward. A lesson is a forward and a
        # backward pass (3) for every n-th batch; of a Sobolev one the backward pass goes through both passes (6).
        return PASSES[self.form][0], PASSES[self.form][1] / self.every_n_batches

    @override
    def cost(self, spec: NetworkSpec) -> ExtraCost:
        # In units of three passes: forward and backward of a stage.
        model_passes, passes = (1 + 3 / self.every_n_batches) / 3, sum(self.passes()) / 3

        def work(shape: Shape) -> float:
            classifier = 0.0
            if self.form != "direct":
                classifier = passes * head_multiplications(
                    self.name, shape, spec.classes, self.hidden, POOL, 0.0
                )
            if self.form == "sobolev":
                return classifier
            model = prediction_cost(self.name, shape, self.hidden, self.kernel_size)
            model += ELEMENTWISE * prediction_values(self.name, shape, self.hidden)
            return model_passes * model + classifier

        return work

    @override
    def describe(self) -> str:
        if self.form == "sobolev":
            return f"{self.name} classifiers that learn the true gradient"
        seen = " that see the label" if self.conditional else ""
        return f"{self.name} estimators{seen}{', behind classifiers' if self.form == 'residual' else ''}"

    @override
    def identity(self) -> dict[str, Any]:
        shaping: dict[str, Any] = {"name": self.name, "hidden": list(self.hidden), "form": self.form}
        shaping |= {"conditional": self.conditional, "kernel_size": self.kernel_size}
        return {f"strategy.estimator.{key}": value for key, value in shaping.items()}

    @override
    def training_identity(self) -> dict[str, Any]:
        return {"strategy.estimator.optimizer.name": self.optimizer["name"]}
