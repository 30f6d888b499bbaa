"""The schedule and gradient source of each mode of a level in a multilevel training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sglight.config.levels import Level
from sglight.gradients import GradientSource, LocalLoss, Synthetic, Taught, TrueGradient
from sglight.gradients.delayed import BACKWARDS
from sglight.gradients.restepped import Restepped
from sglight.networks.dynamics import Dynamics
from sglight.strategies.pieces import exact_schedule, late_schedule
from sglight.strategies.schedule import Decoupled, Locked, Schedule, Unanswered


@dataclass(frozen=True)
class Modes:
    """The settings of all modes.

    Attributes:
        stages: M.
        lag: of levels with synthetic gradients.
        estimated: the source of levels with estimators or heads; None if there are no such levels.
        microbatches: of levels with late or exact gradients.
        slack, backward: of levels with late gradients.
    """

    stages: int
    lag: int
    estimated: Synthetic | LocalLoss | None
    microbatches: int | None
    slack: int
    backward: str

    def of(self, level: Level, rule: Dynamics, finer: int) -> tuple[Schedule, GradientSource]:
        """The schedule and source of a level.

        Args:
            level: its settings.
            rule: the dynamics of the network.
            finer: the step size of the coarsest level, divided by that of this one.
        """
        pieces = self.pieces(level)
        if level.mode == "delayed":
            return late_schedule(pieces, self.slack, self.stages), BACKWARDS[self.backward]()
        source = self.estimated
        if source is None:
            return exact_schedule(pieces, self.stages), TrueGradient()
        if level.estimator_lr is not None:
            source = replace(source, optimizer={**source.optimizer, "lr": level.estimator_lr})
        source = replace(source, restepped=Restepped(rule, finer))
        match level.mode:
            case "exact":
                return Locked(lessons=True), Taught(source)
            case "local":
                return Unanswered(), source
            case _:
                return Decoupled(self.lag), source

    def pieces(self, level: Level) -> int | None:
        """Into how many pieces batches are split at a level; None if it depends on the batch size."""
        return self.microbatches if level.microbatches is None else level.microbatches
