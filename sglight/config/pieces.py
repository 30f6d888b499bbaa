"""Into how many microbatches a batch is split; imports no torch."""

from __future__ import annotations

# Microbatches for each stage but one, in a pipeline that is emptied after each batch. With m microbatches and M stages
# a stage is idle in M - 1 of m + M - 1 rounds: with m = 4 (M - 1), in a fifth of them.
FLUSHED = 4


def check_microbatches(microbatches: int | None) -> None:
    """Refuse a number of microbatches below 1.

    Raises:
        ValueError: about ``strategy.microbatches``.
    """
    if microbatches is not None and microbatches < 1:
        raise ValueError(f"strategy.microbatches={microbatches} must be at least 1, or null")


def check_shared(microbatches: int | None, workers: int) -> None:
    """Refuse several workers with one microbatch, of which only one worker would ever be busy at a time.

    Raises:
        ValueError: about ``strategy.microbatches``.
    """
    if workers > 1 and microbatches == 1:
        raise ValueError(
            f"strategy.microbatches=1 leaves all but one of {workers} workers idle all the time; use more, as "
            f"strategy.microbatches={FLUSHED * (workers - 1)}, or leave it null"
        )


def divisor(samples: int | None, least: int) -> int:
    """The smallest divisor of a batch size that is at least ``least``; ``least`` if there is none up to 2 ``least``.

    >>> divisor(64, 6)
    8
    """
    least = max(least, 1)
    divisors = (m for m in range(least, 2 * least + 1) if samples is not None and samples % m == 0)
    return next(divisors, least)
