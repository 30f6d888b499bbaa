"""The schedules of true gradients, with a default for the number of pieces into which a batch is split."""

from __future__ import annotations

from dataclasses import replace

from sglight.config.pieces import FLUSHED, check_microbatches, divisor
from sglight.strategies.schedule import Locked, Pipelined, Schedule


def exact_schedule(microbatches: int | None, stages: int) -> Schedule:
    """The schedule of backpropagation: on whole batches, or in a pipeline that is emptied after each batch."""
    check_microbatches(microbatches)
    if microbatches == 1 or (microbatches is None and stages == 1):
        return Locked()
    return settled(Pipelined(microbatches or 1, flushes=True), microbatches, None, stages - 1)


def late_schedule(microbatches: int | None, slack: int, stages: int) -> Schedule:
    """The schedule of late gradients: a pipeline that is not emptied within an epoch."""
    check_microbatches(microbatches)
    return settled(Pipelined(microbatches or 1, slack), microbatches, None, stages - 1)


def settled(schedule: Schedule, microbatches: int | None, samples: int | None, last: int) -> Schedule:
    """A schedule with its default number of pieces, if ``microbatches`` is None.

    For late gradients it is the longest delay, so that they are late by at most one update; for a pipeline that is
    emptied after each batch it is `FLUSHED` times the number of stages but one. It is rounded up to a divisor of
    ``samples``.

    Args:
        schedule: to be completed.
        microbatches: of the config.
        samples: in a batch, if known.
        last: the number of the last stage.
    """
    if microbatches is not None or not isinstance(schedule, Pipelined):
        return schedule
    least = FLUSHED * last if schedule.flushes else schedule.delay(0, last)
    return replace(schedule, pieces=divisor(samples, least))
