"""The schedules of true gradients, with the number of pieces that a batch is cut into where nobody says it."""

from __future__ import annotations

from dataclasses import replace

from sglight.config.pieces import FLUSHED, check_microbatches, divisor
from sglight.strategies.schedule import Locked, Pipelined, Schedule


def exact_schedule(microbatches: int | None, stages: int) -> Schedule:
    """True gradients: of the whole batch, or of its pieces in a pipeline that empties with each batch."""
    check_microbatches(microbatches)
    if microbatches == 1 or (microbatches is None and stages == 1):
        return Locked()
    return settled(Pipelined(microbatches or 1, flushes=True), microbatches, None, stages - 1)


def late_schedule(microbatches: int | None, slack: int, stages: int) -> Schedule:
    """True gradients that come late, from a pipeline that never empties within an epoch."""
    check_microbatches(microbatches)
    return settled(Pipelined(microbatches or 1, slack), microbatches, None, stages - 1)


def settled(schedule: Schedule, microbatches: int | None, samples: int | None, last: int) -> Schedule:
    """A schedule with its number of pieces, if that is left open (``microbatches`` is None).

    As many as the longest delay, with which gradients are late by one update at most; `FLUSHED` for each stage but the
    last where the pipeline empties.

    Args:
        samples: in a batch, if that is known. last: the number of the last stage.
    """
    if microbatches is not None or not isinstance(schedule, Pipelined):
        return schedule
    least = FLUSHED * last if schedule.flushes else schedule.delay(0, last)
    return replace(schedule, pieces=divisor(samples, least))
