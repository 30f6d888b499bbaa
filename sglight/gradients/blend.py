"""Blends of the true gradient with that of an estimator or a local head.

With b the weight, d the gradient of the estimator or head, and t the gradient that the next stage sends:

    waiting     b t + (1 - b) d, where t has been blended at later boundaries
                (BP(lambda), Jaderberg et al. 2017, supplement A)
    arriving    (1 - b) d at once, and b t of an earlier batch when it arrives; t is not blended
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from sglight.gradients.base import Boundary, Passage, run
from sglight.gradients.true import Taught
from sglight.networks import Stage


@dataclass(frozen=True)
class Ramp:
    """A weight that changes linearly from ``first`` to ``last`` over ``batches`` batches and then stays there.

    >>> Ramp(1.0, 0.0, batches=10).at(4)
    0.6
    """

    first: float
    last: float
    batches: float = 1.0

    def at(self, batch: int) -> float:
        """The weight in a batch of the training; the first one is 0."""
        return self.first + (self.last - self.first) * min(batch / self.batches, 1.0)

    def __str__(self) -> str:
        return f"{self.first:g}" if self.first == self.last else f"{self.first:g} to {self.last:g}"


@dataclass(frozen=True)
class Blended(Taught):
    """True gradients blended with those of another source, whose estimators learn as they would by themselves.

    Args:
        source: the other source.
        weight: of the true gradient.
        arrives: whether the true gradient is used when it arrives; otherwise it is waited for.
    """

    weight: Ramp
    arrives: bool
    predicts: ClassVar[bool] = True

    @property
    @override
    def stashes(self) -> bool:  # type: ignore[override]
        return self.arrives

    @property
    @override
    def lesson_every(self) -> int:  # type: ignore[override]
        return self.source.lesson_every

    @override
    def forward(self, stage: Stage, passage: Passage) -> Tensor:
        return run(stage, passage) if self.arrives else super().forward(stage, passage)

    @override
    def gradient(self, boundary: Boundary, passage: Passage, true: Tensor | None) -> Tensor:
        weight, own = self.weight.at(passage.batch), self.source.gradient(boundary, passage, None)
        return (1 - weight) * own if true is None else weight * true + (1 - weight) * own

    @override
    def part(self, batch: int) -> float:
        return self.weight.at(batch)

    @override
    def describe(self) -> str:
        when = "arrives later" if self.arrives else "is waited for"
        return f"{self.weight} of the true gradient, which {when}, the rest of {super().describe()}"
