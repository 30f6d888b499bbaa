"""Backpropagation through the whole network: the reference for every other strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack

from typing_extensions import override

from sglight.compat.lightning import batch_size
from sglight.config.pieces import check_shared
from sglight.strategies.pieces import exact_schedule, settled
from sglight.strategies.staged import InStages, StagedModule


class Backprop(StagedModule):
    """The true gradient of each batch; several workers share it as a pipeline that empties with each batch.

    One forward, one backward (1F1B): Narayanan et al. 2021, PipeDream-Flush. Arguments as in `StagedModule`, and

    Args:
        stages: M, from 1 to the number of steps; a worker holds at least one.
        microbatches: m, into how many pieces a batch is cut, whose gradients add up. None for one if there is one
            stage, otherwise four for each stage but the last (the smallest divisor of the batch size from there on).

    Raises:
        ValueError: for values that are not allowed; the text names the key.
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        stages: int = 1,
        microbatches: int | None = None,
        diagnose_every_n_batches: int = 0,
        **shared: Unpack[InStages],
    ) -> None:
        self.microbatches = microbatches
        super().__init__(
            network, optimizer, **shared, stages=stages, diagnose_every_n_batches=diagnose_every_n_batches,
            schedule=exact_schedule(microbatches, stages),
        )  # fmt: skip

    @override
    def groups(self, workers: int) -> list[range]:
        groups = super().groups(workers)
        check_shared(self.microbatches, workers)
        return groups

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            samples = batch_size(self.trainer)
            schedule = settled(self.plan.schedule, self.microbatches, samples, self.plan.last)
            self.follow(replace(self.plan, schedule=schedule))
