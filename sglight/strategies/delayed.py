"""True gradients that arrive late: a pipeline that is never emptied, so that all stages stay busy.

There is a round for each microbatch. In round n stage i of M goes forward on microbatch n and backward on n - d_i,
d_i = (1 + slack) (M - 1 - i), and updates after the last microbatch of a batch. Huo et al. 2018 (DDG, features replay);
Narayanan et al. 2019, 2021 (PipeDream, 2BW); Rivaud et al. 2025 (PETRA).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, Unpack

from typing_extensions import override

from sglight import units
from sglight.compat.lightning import batch_size
from sglight.gradients.delayed import BACKWARDS, check_backward
from sglight.networks import NetworkSpec
from sglight.strategies.optim import betas
from sglight.strategies.pieces import late_schedule, settled
from sglight.strategies.schedule import Pipelined
from sglight.strategies.simulation import in_flight
from sglight.strategies.staged import Batch, InStages, StagedModule


class Delayed(StagedModule):
    """M stages, each trained with true gradients that come late: stage i saw their microbatch d_i rounds ago.

    The first stage waits longest, d_0 = (1 + slack) (M - 1), the last one not at all.

    Args:
        network, optimizer, shared: see `StagedModule`.
        stages: M, from 1 to the number of steps.
        microbatches: m, into how many pieces a batch is split. With m >= d_0 gradients are late by at most one update.
            None for the smallest divisor of the batch size that is at least d_0 (or d_0 itself, if that divisor is
            more than twice as large).
        slack: 1 adds a round between two stages, so that a stage that takes longer once does not hold up others; or 0.
        backward: ``stashed``, ``replayed`` or ``rebuilt``, see `sglight.gradients.delayed`.
        exact_epochs: for so many epochs at the beginning (perhaps a fraction) the pipeline is emptied after each batch.
            Late gradients do less harm to a network that has begun with exact ones.
        moments: whether the optimisers ``reset`` or ``keep`` their moments when late gradients begin. The second
            moments of small exact gradients would make the first late steps too long.
        diagnose_every_n_batches: compare the gradients that stages use with exact ones so often; 0 for never.

    Raises:
        ValueError: for values that do not exist or do not go together; the text names the key.

    >>> network = {"shape": (2,), "classes": 3, "channels": 4, "steps": 8}
    >>> module = Delayed(network, {"name": "adam", "lr": 0.01}, stages=4, microbatches=1)
    >>> [module.plan.schedule.staleness(i, 8, last=3) for i in range(4)]  # in updates
    [3, 2, 1, 0]
    """

    def __init__(
        self,
        network: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        stages: int = 2,
        microbatches: int | None = None,
        slack: int = 0,
        backward: str = "stashed",
        exact_epochs: float = 0,
        moments: str = "reset",
        diagnose_every_n_batches: int = 100,
        **shared: Unpack[InStages],
    ) -> None:
        check_backward(backward, NetworkSpec(**network))
        if slack not in (0, 1):
            raise ValueError(f"strategy.slack={slack} is not allowed; it must be 0 or 1")
        if moments not in ("reset", "keep"):
            raise ValueError(f"strategy.moments={moments} is unknown; choose reset or keep")
        if not 0 <= exact_epochs < math.inf:
            raise ValueError(f"strategy.exact_epochs={exact_epochs} must be 0 or more")
        self.microbatches, self.passes = microbatches, backward
        super().__init__(
            network, optimizer, **shared, stages=stages,
            schedule=late_schedule(microbatches, slack, stages),
            source=BACKWARDS[backward](), diagnose_every_n_batches=diagnose_every_n_batches,
        )  # fmt: skip
        self.exact_epochs, self.moments = exact_epochs, moments
        self.is_late = True
        self._begin(late=exact_epochs == 0)

    def _begin(self, late: bool) -> None:
        """Switch to late gradients, or to exact ones."""
        if late != self.is_late:
            self.is_late = late
            self.follow(replace(self.plan, schedule=replace(self._schedule, flushes=not late)))

    @property
    @override
    def in_flight(self) -> int:
        schedules = {replace(self._schedule, flushes=False), self.plan.schedule}
        return max(in_flight(schedule, self.plan.last + 1) for schedule in schedules)

    @property
    def _schedule(self) -> Pipelined:
        schedule = self.plan.schedule
        assert isinstance(schedule, Pipelined)
        return schedule

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if not self.is_late and self._exact_is_over():
            self._begin(late=True)
            self.runtime.begin(self.runtime.batch)
            for (i, _), optimizer in zip(self.own_stages(), self.trainer.optimizers, strict=False):
                if self.moments == "reset":
                    optimizer.state.clear()
                for group in optimizer.param_groups if self.plan.optimizer["name"] == "nadam" else ():
                    group["betas"] = betas(
                        self.plan.optimizer, self.plan.schedule.lateness(i, self.plan.last)
                    )
        super().training_step(batch, batch_idx)

    def _exact_is_over(self) -> bool:
        batches = self.trainer.num_training_batches
        if math.isinf(batches):  # the length of an epoch is not known: only whole epochs are counted
            return self.current_epoch >= self.exact_epochs
        return self.runtime.batch >= self.exact_epochs * batches

    @override
    def progress(self) -> dict[str, Any]:
        return {**super().progress(), "is_late": self.is_late}

    @override
    def restore_progress(self, progress: Mapping[str, Any]) -> None:
        self._begin(progress["is_late"])
        super().restore_progress(progress)

    @override
    def facts(self) -> list[str]:
        last, schedule = self.plan.last, replace(self._schedule, flushes=False)
        # In a full pipeline; the first piece of a batch waits longest.
        piece = schedule.pieces * (schedule.latency(last) + 1)
        late = ", ".join(str(schedule.staleness(i, piece, last)) for i in range(last + 1))
        name, stages, *rest = super().facts()
        source = f"{self.passes} backward passes, {units.size(self.bytes_in_flight())} in flight"
        exact = f"exact for the first {self.exact_epochs:g} epochs, then " if self.exact_epochs else ""
        fresh = f", moments {self.moments}" if self.exact_epochs else ""
        return [name, stages, f"{exact}gradients late by {late} updates, by stage{fresh}", source, *rest]

    def bytes_in_flight(self) -> int:
        """About how many bytes all stages keep of microbatches between their forward and backward passes.

        If the batch size of the data is not known, a microbatch is taken to be one sample.
        """
        spec, schedule, last = self.spec, self._schedule, self.plan.last
        samples = -(-(batch_size(self.trainer) or schedule.pieces) // schedule.pieces)
        values = 0
        for i, (start, stop) in enumerate(pairwise(self.cuts)):
            state = math.prod(spec.state_shape(start))
            kept = state
            if self.passes == "stashed" and not spec.reversible:
                kept += sum(spec.step_values()[start:stop]) + (stop - start) * state
            values += kept * samples * (schedule.delay(i, last) + 1)
        return 4 * values

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.microbatches is None:
            # Exact epochs have the same number of pieces.
            late = replace(self._schedule, flushes=False)
            pieces = settled(late, None, batch_size(self.trainer), self.plan.last).pieces
            self.follow(replace(self.plan, schedule=replace(self._schedule, pieces=pieces)))
