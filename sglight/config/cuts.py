"""Cuts that a user gives; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def given_cuts(cuts: Sequence[int], steps: int, stages: int, multiple: int = 1) -> tuple[int, ...]:
    """All M + 1 positions of a network's cuts, from the M - 1 between its ends.

    Args:
        cuts: the time steps with which stages 1 to M - 1 begin, counted from 0.
        multiple: of which all cuts must be multiples.

    Raises:
        ValueError: if they do not make so many stages, or lie elsewhere.
    """
    positions = (0, *cuts, steps)
    if len(cuts) != stages - 1:
        raise ValueError(
            f"strategy.cuts={list(cuts)} makes {len(cuts) + 1} stages, but strategy.stages={stages}; set "
            f"strategy.stages={len(cuts) + 1}, or strategy.cuts=null"
        )
    if any(a >= b for a, b in pairwise(positions)):
        raise ValueError(
            f"strategy.cuts={list(cuts)} is not allowed; it must be numbers of time steps from 1 to {steps - 1}, "
            "each greater than the one before it"
        )
    if wrong := [cut for cut in cuts if cut % multiple]:
        raise ValueError(
            f"strategy.cuts={list(cuts)} is not allowed: {wrong[0]} must be a multiple of {multiple}, so that the "
            "coarsest level has a cut there"
        )
    return positions
