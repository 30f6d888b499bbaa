"""Local losses as a gradient source: a head at each boundary classifies the states, and its loss trains the stage.

Belilovsky et al. 2020, Nøkland & Eidnes 2019. With h the state after a stage, y the labels, l the loss of the head and
phi its parameters:

    d = dl(h, y)/dh                      the stage uses it instead of dL/dh
    dl(h, y)/dphi                        the optimiser of the head uses it

The next stage sends nothing back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from sglight.config.schema import HeadConfig, OptimizerConfig
from sglight.config.settings import settings
from sglight.gradients.base import Boundary, GradientSource, Passage
from sglight.gradients.estimators import fitting
from sglight.gradients.heads import OPTIMIZER, Criterion, Head, head_multiplications
from sglight.gradients.restepped import UNCHANGED, Restepped
from sglight.networks import NetworkSpec
from sglight.networks.network import ExtraCost
from sglight.networks.parts import Shape


@dataclass(frozen=True)
class LocalLoss(GradientSource):
    """Gradients of the losses of local heads.

    Args:
        criterion: the loss of the network.
        name, hidden, pool: see `Head`.
        loss: ``classify`` or ``predsim`` (with similarity matching).
        similarity: the weight of similarity matching in ``predsim``.
        optimizer: of the heads, see `sglight.strategies.optim`.
        restepped: converts states in a multilevel training.
    """

    criterion: Criterion
    name: str
    hidden: Sequence[int]
    pool: int
    loss: str
    similarity: float
    optimizer: Mapping[str, Any]
    restepped: Restepped = UNCHANGED
    predicts: ClassVar[bool] = True

    @classmethod
    def of(cls, config: Mapping[str, Any] | None, criterion: Criterion) -> LocalLoss:
        """The source for the config section ``strategy.head``, completed by its defaults.

        Raises:
            ValueError: for a key or a choice that does not exist, or missing widths.
        """
        found = settings(HeadConfig, config, "strategy.head")
        found["optimizer"] = settings(OptimizerConfig, (config or {}).get("optimizer"), OPTIMIZER)
        if found["name"] == "conv" and not found["hidden"]:
            raise ValueError(
                "strategy.head.hidden=[] leaves head.name=conv without convolutions; give widths"
            )
        return cls(criterion, **found)

    @override
    def wants(self, batch: int) -> bool:
        return False

    @override
    def gradient(self, boundary: Boundary, passage: Passage, true: Tensor | None) -> Tensor:
        state = self.restepped.state(passage.state)
        gradient, passage.lesson = boundary.estimator.descend(state, passage.labels)
        return self.restepped.gradient(gradient)

    @override
    def estimate(self, boundary: Boundary, passage: Passage) -> Tensor:
        state = self.restepped.state(passage.state)
        return self.restepped.gradient(boundary.estimator.estimate(state, passage.labels, boundary.time))

    @override
    def learn(self, boundary: Boundary, passage: Passage) -> Tensor:
        state = self.restepped.state(passage.state)
        return boundary.estimator.learn(state, passage.labels, None, boundary.time)

    @override
    def make_estimator(self, spec: NetworkSpec, cuts: Sequence[int], stage: int) -> Head:
        position = cuts[stage + 1]
        shape = fitting(self.name, spec.state_shape(position), "head")
        return Head(
            self.name, shape, spec.classes, self.hidden, self.pool, self._similarity, self.criterion, spec.seed,
            "heads", position,
        )  # fmt: skip

    @property
    def _similarity(self) -> float:
        return self.similarity if self.loss == "predsim" else 0.0

    @override
    def estimator_optimizer(self) -> dict[str, Any]:
        return dict(self.optimizer)

    @override
    def passes(self) -> tuple[float, float]:
        return 3.0, 0.0

    @override
    def cost(self, spec: NetworkSpec) -> ExtraCost:
        def work(shape: Shape) -> float:
            fits = fitting(self.name, shape, "head")
            return head_multiplications(
                self.name, fits, spec.classes, self.hidden, self.pool, self._similarity
            )

        return work

    @override
    def describe(self) -> str:
        return f"{self.name} heads that {'match similarities' if self._similarity else 'classify'}"

    @override
    def identity(self) -> dict[str, Any]:
        shaping = {"name": self.name, "hidden": list(self.hidden), "pool": self.pool, "loss": self.loss}
        return {f"strategy.head.{key}": value for key, value in shaping.items()}

    @override
    def training_identity(self) -> dict[str, Any]:
        return {"strategy.head.optimizer.name": self.optimizer["name"]}
