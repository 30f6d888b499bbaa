"""True gradients, which the next stage sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from sglight.gradients.base import Boundary, GradientSource, Passage
from sglight.networks import NetworkSpec
from sglight.networks.network import ExtraCost


class TrueGradient(GradientSource):
    """The true gradient dL/dh, which the stage after the boundary sends back."""

    @override
    def gradient(self, boundary: Boundary, passage: Passage, true: Tensor | None) -> Tensor:
        assert true is not None
        return true

    @override
    def wants(self, batch: int) -> bool:
        return True


@dataclass(frozen=True)
class Taught(TrueGradient):
    """True gradients, from which the estimators of another source already learn, although they are not used yet.

    Args:
        source: has the estimators.
    """

    source: GradientSource

    @property
    @override
    def lesson_every(self) -> int:  # type: ignore[override]
        # A source whose estimators learn while they give a gradient has 0, but here they give none.
        return self.source.lesson_every or 1

    @property
    @override
    def learns_together(self) -> bool:  # type: ignore[override]
        return self.source.learns_together

    @override
    def learn(self, boundary: Boundary, passage: Passage) -> Tensor:
        return self.source.learn(boundary, passage)

    @override
    def estimate(self, boundary: Boundary, passage: Passage) -> Tensor:
        return self.source.estimate(boundary, passage)

    @override
    def make_estimator(self, spec: NetworkSpec, cuts: Sequence[int], stage: int) -> nn.Module | None:
        return self.source.make_estimator(spec, cuts, stage)

    @override
    def estimator_optimizer(self) -> dict[str, Any]:
        return self.source.estimator_optimizer()

    @override
    def cost(self, spec: NetworkSpec) -> ExtraCost:
        return self.source.cost(spec)

    @override
    def passes(self) -> tuple[float, float]:
        return self.source.passes()

    @override
    def describe(self) -> str:
        return self.source.describe()

    @override
    def identity(self) -> dict[str, Any]:
        return self.source.identity()

    @override
    def training_identity(self) -> dict[str, Any]:
        return self.source.training_identity()
