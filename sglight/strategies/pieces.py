"""How many pieces a batch is cut into where nobody says it."""

from __future__ import annotations

from dataclasses import replace

from sglight.strategies.schedule import Locked, Pipelined, Schedule

# Behind the last stage, a pipeline that empties with each batch of m pieces is idle for M - 1 of m + M - 1 rounds: with
# so many pieces for each stage but one, for a fifth of them.
FLUSHED = 4


def check_microbatches(microbatches: int | None) -> None:
    """Refuse what is no number of pieces.

    Raises:
        ValueError: about ``strategy.microbatches``.
    """
    if microbatches is not None and microbatches < 1:
        raise ValueError(f"strategy.microbatches={microbatches} must be at least 1, or null")


def check_shared(microbatches: int | None, workers: int) -> None:
    """Refuse a pipeline that empties with each batch and shares nothing.

    Raises:
        ValueError: about ``strategy.microbatches``.
    """
    if workers > 1 and microbatches == 1:
        raise ValueError(
            f"strategy.microbatches=1 leaves all but one of {workers} workers idle all the time; use more, as "
            f"strategy.microbatches={FLUSHED * (workers - 1)}, or leave it null"
        )


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


def divisor(samples: int | None, least: int) -> int:
    """The smallest divisor of a batch size from ``least`` on; ``least`` itself if there is none up to twice of it."""
    least = max(least, 1)
    divisors = (m for m in range(least, 2 * least + 1) if samples is not None and samples % m == 0)
    return next(divisors, least)
