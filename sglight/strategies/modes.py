"""What the mode of a level in a multilevel training stands for: a schedule and a gradient source."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sglight.config.levels import Level
from sglight.gradients import GradientSource, LocalLoss, Synthetic, Taught, TrueGradient
from sglight.gradients.delayed import BACKWARDS
from sglight.gradients.synthetic import Restepped
from sglight.networks.dynamics import Dynamics
from sglight.strategies.pieces import exact_schedule, late_schedule
from sglight.strategies.schedule import Decoupled, Locked, Schedule, Unanswered


@dataclass(frozen=True)
class Modes:
    """The settings of all modes.

    Attributes:
        stages: M. lag: of levels with synthetic gradients. estimated: the source of those that estimate gradients, by
            estimators or heads; None without such levels.
        microbatches, slack, backward: of levels with late gradients; microbatches also of exact ones.
    """

    stages: int
    lag: int
    estimated: Synthetic | LocalLoss | None
    microbatches: int | None
    slack: int
    backward: str

    def of(self, level: Level, rule: Dynamics, finer: int) -> tuple[Schedule, GradientSource]:
        """Schedule and source of a level; numbers of pieces that are left open may change with the batch size.

        Args:
            rule: of the network. finer: by how much the level's steps are smaller than the coarsest's.
        """
        pieces = self.pieces(level)
        if level.mode == "delayed":
            return late_schedule(pieces, self.slack, self.stages), BACKWARDS[self.backward]()
        source = self.estimated
        if source is None:
            return exact_schedule(pieces, self.stages), TrueGradient()
        if level.estimator_lr is not None:
            source = replace(source, optimizer={**source.optimizer, "lr": level.estimator_lr})
        if isinstance(source, Synthetic):
            source = replace(source, restepped=Restepped(rule, finer))
        match level.mode:
            case "exact":
                return Locked(lessons=True), Taught(source)
            case "local":
                return Unanswered(), source
            case _:
                return Decoupled(self.lag), source

    def pieces(self, level: Level) -> int | None:
        """Into how many pieces the batches of a level are cut; None if that is left open."""
        return self.microbatches if level.microbatches is None else level.microbatches
