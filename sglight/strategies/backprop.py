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
    """Backpropagation: the true gradient of each batch.

    Several workers form a pipeline that is emptied after each batch: one forward pass and one backward pass in
    turn (1F1B; Narayanan et al. 2021, PipeDream-Flush).

    Args:
        network, optimizer, shared: see `StagedModule`.
        stages: M, from 1 to the number of steps; each worker has at least one.
        microbatches: m, into how many pieces a batch is split; their gradients are added up. None for 1 with one
            stage, otherwise at least 4 (M - 1), such that it divides the batch size.
        diagnose_every_n_batches: compare the gradients that stages use with exact ones so often; 0 for never.

    Raises:
        ValueError: for values that are not allowed; the text names the key.

    >>> network = {"shape": (2,), "classes": 3, "channels": 4, "steps": 8}
    >>> module = Backprop(network, {"name": "adam", "lr": 0.01}, stages=2)
    >>> module.cuts
    (0, 4, 8)
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
