"""How many pieces a batch is cut into; imports no torch."""

from __future__ import annotations

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


def divisor(samples: int | None, least: int) -> int:
    """The smallest divisor of a batch size from ``least`` on; ``least`` itself if there is none up to twice of it."""
    least = max(least, 1)
    divisors = (m for m in range(least, 2 * least + 1) if samples is not None and samples % m == 0)
    return next(divisors, least)
