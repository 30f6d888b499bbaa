"""Blends of true gradients with those of local heads or estimators; `sglight.gradients.blend` has the formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

from typing_extensions import override

from sglight.errors import UserError
from sglight.gradients import Blended, LocalLoss, Ramp, Synthetic
from sglight.strategies.loss import Loss
from sglight.strategies.schedule import Arriving, Locked
from sglight.strategies.staged import InStages, StagedModule

ARRIVALS = ("wait", "late")


class Blend(StagedModule):
    """M stages, trained with a weighted mean of the true gradient and that of another source.

    Args:
        network, optimizer, shared: see `StagedModule`.
        stages: M, from 1 to the number of steps.
        source: the other source, ``local`` or ``synthetic``.
        blend: the weight of the true gradient, from 0 (none) to 1 (backpropagation, if it is waited for).
        blend_last, blend_epochs: the weight to which it changes linearly, and in how many epochs; None for a constant
            weight, and for all epochs.
        arrival: ``wait`` for the true gradient, or use it when it arrives (``late``). Then stages do not wait for each
            other; true gradients pass through all of them without being blended, and estimators learn from them.
        estimator, head: see `DNI` and `Local`.
        diagnose_every_n_batches: compare the gradients that stages use with exact ones so often; 0 for never.

    Raises:
        ValueError: for values that are not allowed; the text names the key.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        stages: int = 2,
        source: str = "local",
        blend: float = 0.5,
        blend_last: float | None = None,
        blend_epochs: float | None = None,
        arrival: str = "wait",
        estimator: Mapping[str, Any] | None = None,
        head: Mapping[str, Any] | None = None,
        diagnose_every_n_batches: int = 50,
        **shared: Unpack[InStages],
    ) -> None:
        for key, value, options in (
            ("source", source, ("local", "synthetic")),
            ("arrival", arrival, ARRIVALS),
        ):
            if value not in options:
                raise ValueError(f"strategy.{key}={value} is unknown; choose {' or '.join(options)}")
        for key, weight in (("blend", blend), ("blend_last", blend_last)):
            if weight is not None and not 0 <= weight <= 1:
                raise ValueError(f"strategy.{key}={weight} is not allowed; it must be from 0 to 1")
        loss = Loss(**dict(shared.get("loss") or {}))
        own: LocalLoss | Synthetic = (
            Synthetic.of(estimator, network.get("kernel", "dense"), loss)
            if source == "synthetic"
            else LocalLoss.of(head, loss)
        )
        late = arrival == "late"
        self.blend_epochs = blend_epochs
        super().__init__(
            network, optimizer, **shared, stages=stages,
            schedule=Arriving() if late else Locked(lessons=own.lesson_every > 0),
            source=Blended(own, Ramp(blend, blend if blend_last is None else blend_last), late),
            diagnose_every_n_batches=diagnose_every_n_batches,
        )  # fmt: skip

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        source = self.plan.source
        assert isinstance(source, Blended)
        if source.weight.first != source.weight.last:
            weight = replace(source.weight, batches=self._batches_of_the_ramp())
            self.follow(replace(self.plan, source=replace(source, weight=weight)))

    def _batches_of_the_ramp(self) -> float:
        """The number of batches after which the weight is constant."""
        epochs = self.trainer.max_epochs if self.blend_epochs is None else self.blend_epochs
        batches = self.trainer.num_training_batches
        if epochs in (None, -1) or math.isinf(batches):
            raise UserError(
                "strategy.blend_last needs to know in how many batches it is reached, and this training is endless; "
                "set it to null, or limit the training by max_epochs and limit_train_batches"
            )
        return float(epochs) * batches
