"""How a network is trained at one depth: all decisions of a strategy in one immutable object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sglight.gradients import Boundary, GradientSource, TrueGradient
from sglight.networks import NetworkSpec
from sglight.networks.network import balanced
from sglight.strategies.grid import schedule_grid
from sglight.strategies.loss import Loss
from sglight.strategies.schedule import Locked, Schedule
from sglight.strategies.simulation import StageTimes

UNIT = "multiplications a sample"


@dataclass(frozen=True)
class Plan:
    """A network, its cuts into stages, their schedule and gradient source, and their optimisation.

    Attributes:
        spec: of the network.
        cuts: M + 1 positions from 0 to the number of steps.
        optimizer, scheduler: see `sglight.strategies.optim`; each stage has its own.
        clip_norm: the largest norm of a gradient; None for no limit.
        regularisation: weights of the penalties in `sglight.networks.regularisers.penalty`.
        loss: to be minimised.
        schedule, source: of the stages.
        coarseness: the step size of this network, divided by that of the finest one in a multilevel training.
    """

    spec: NetworkSpec
    cuts: tuple[int, ...]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=lambda: {"name": "none"})
    clip_norm: float | None = None
    regularisation: Mapping[str, float] = field(default_factory=dict)
    loss: Loss = field(default_factory=Loss)
    schedule: Schedule = field(default_factory=Locked)
    source: GradientSource = field(default_factory=TrueGradient)
    coarseness: int = 1

    @property
    def last(self) -> int:
        """The number of the last stage."""
        return len(self.cuts) - 2

    @property
    def rebuilds(self) -> bool:
        """Whether backward passes rebuild states, which may differ from those of the forward passes."""
        return self.spec.reversible or self.source.rebuilds

    def boundary_shape(self, stage: int, count: int) -> tuple[int, ...]:
        """The shape of a state of ``count`` samples after a stage."""
        return (count, *self.spec.state_shape(self.cuts[stage + 1]))

    def boundary(self, stage: int, estimator: Any = None) -> Boundary:
        """The boundary after a stage."""
        return Boundary(stage, self.spec.time(self.cuts[stage + 1]), estimator)

    def groups(self, workers: int) -> list[range]:
        """The stages of each of ``workers`` processes: consecutive ones, of nearly equal cost.

        Raises:
            ValueError: if there are fewer stages than workers.
        """
        if workers > self.last + 1:
            raise ValueError(
                f"{workers} workers for {self.last + 1} stage(s): raise strategy.stages, or lower trainer.devices"
            )
        bounds = balanced(self.spec.stage_work(self.cuts, self.source.cost(self.spec)), workers)
        return [range(a, b) for a, b in pairwise(bounds)]

    def shown_groups(self, groups: int, replicas: int = 1) -> list[range]:
        """The groups for which schedule and ideal speed-up are shown; for one worker, those with a worker a stage."""
        return self.groups(self.last + 1 if groups == replicas == 1 else groups)

    def stage_times(self) -> list[StageTimes]:
        """The cost of the phases of each stage by the cost model, in multiplications per sample."""
        stages = self.spec.stage_work(self.cuts)
        both = self.spec.stage_work(self.cuts, self.source.cost(self.spec))
        estimates, lessons = self.source.passes()
        # `GradientSource.cost` is in units of three passes: forward and backward of a stage.
        parts = [(w, 3 * (b - w) / ((estimates + lessons) or 1)) for w, b in zip(stages, both, strict=True)]
        again = [self.schedule.sends(i, self.last) == "arrive" for i in range(self.last + 1)]
        return [
            StageTimes(work, estimates * e, 2 * work, lessons * e, 2 * work * arrives)
            for (work, e), arrives in zip(parts, again, strict=True)
        ]

    def grid(self, groups: int, replicas: int = 1) -> str:
        """The schedule of `shown_groups` as text, by the cost model."""
        shown = self.shown_groups(groups, replicas)
        text = schedule_grid(self.schedule, shown, self.stage_times(), replicas=replicas, unit=UNIT)
        imagined = groups == replicas == 1 and self.last
        return f"If each stage had a worker of its own:\n{text}" if imagined else text
