"""When each of M workers does what, for measured times of the phases of a stage: the critical path of DNI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Span(NamedTuple):
    """What a worker did from ``start`` to ``end``, in seconds of `perf_counter`.

    The clock is common to the processes of one machine. ``phase`` is ``forward``, ``estimate``, ``backward``,
    ``learn``, ``send``, or ``wait`` for what another worker sends.
    """

    phase: str
    stage: int
    batch: int
    start: float
    end: float


@dataclass
class StageTimes:
    """Seconds a batch of each phase of a stage, and of the estimator at its end."""

    forward: float = 0.0
    estimate: float = 0.0
    backward: float = 0.0
    learn: float = 0.0

    @property
    def total(self) -> float:
        """All phases in turn."""
        return self.forward + self.estimate + self.backward + self.learn


def period(stages: Sequence[StageTimes], lag: int, batches: int = 64) -> float:
    """Seconds a batch of M workers with one stage each, free messages and unbounded queues, once in full swing.

    Worker i begins batch t when it is free and the state of batch t is there; after its update it learns from the
    gradient of batch t - lag, which has to be there as well (Jaderberg et al. 2017, figure 2).
    """
    last = len(stages) - 1
    free = [0.0] * len(stages)
    # sent[i][t]: when the gradient of batch t left stage i for stage i - 1.
    sent: list[list[float]] = [[] for _ in stages]
    ends = []
    for t in range(batches):
        arrived = 0.0
        for i, stage in enumerate(stages):
            arrived = max(free[i], arrived) + stage.forward
            free[i] = arrived + stage.estimate + stage.backward
            sent[i].append(free[i])
        for i, stage in enumerate(stages[:last]):
            if t >= lag:
                free[i] = max(free[i], sent[i + 1][t - lag]) + stage.learn
        ends.append(max(free))
    half = batches // 2
    return (ends[-1] - ends[half - 1]) / (batches - half)


def speedup(stages: Sequence[StageTimes], lag: int) -> float:
    """How many times faster M workers are than one that does everything in turn: sum of times over `period`."""
    return sum(stage.total for stage in stages) / period(stages, lag)


def stage_names(stages: Sequence[int], part: str = "stage") -> str:
    """Neighbouring stages by number: ``stage 0`` or ``stages 0-1``; ``part``: what they are called."""
    return f"{part} {stages[0]}" if len(stages) == 1 else f"{part}s {stages[0]}-{stages[-1]}"
