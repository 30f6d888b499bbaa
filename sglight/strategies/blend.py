"""Blends of true gradients with those of heads or estimators: see `sglight.gradients.blend` for the formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

from typing_extensions import override

from sglight.config.replicas import refuse_in_blend
from sglight.errors import UserError
from sglight.gradients import Blended, LocalLoss, Ramp, Synthetic
from sglight.strategies.loss import Loss
from sglight.strategies.schedule import Arriving, Locked
from sglight.strategies.staged import InStages, StagedModule

ARRIVALS = ("wait", "late")


class Blend(StagedModule):
    """M stages, each with a part of the true gradient; arguments as in `StagedModule`, and

    Args:
        stages: M, from 1 to the number of steps.
        source: ``local`` or ``synthetic``: what gives the rest.
        blend: weight of the true gradient, from 0 (none) to 1 (backpropagation, where it is waited for).
        blend_last, blend_epochs: the weight to which it moves on a straight line, and in how many epochs; None for a
            constant weight, and for all epochs.
        arrival: ``wait`` for the true gradient, or go on and use it when it comes, ``late``: stages then do not
            wait for each other, true gradients come down through all of them unblended, and teach estimators.
        estimator, head: the settings of `Synthetic` and `LocalLoss`.
        diagnose_every_n_batches: see `Diagnosis`.
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
    def check_replicas(self, replicas: int) -> None:
        refuse_in_blend(replicas)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        source = self.plan.source
        assert isinstance(source, Blended)
        if source.weight.first != source.weight.last:
            weight = replace(source.weight, batches=self._batches_of_the_ramp())
            self.follow(replace(self.plan, source=replace(source, weight=weight)))

    def _batches_of_the_ramp(self) -> float:
        """In how many batches the weight gets to its end."""
        epochs = self.trainer.max_epochs if self.blend_epochs is None else self.blend_epochs
        batches = self.trainer.num_training_batches
        if epochs in (None, -1) or math.isinf(batches):
            raise UserError(
                "strategy.blend_last needs to know in how many batches it is reached, and this training is endless; "
                "set it to null, or limit the training by max_epochs and limit_train_batches"
            )
        return float(epochs) * batches
