"""Checks the cuts between stages that a user gives; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def given_cuts(cuts: Sequence[int], steps: int, stages: int, multiple: int = 1) -> tuple[int, ...]:
    """The M + 1 positions of cuts, from the M - 1 that a user gives: with 0 before and ``steps`` after them.

    Args:
        cuts: the time steps with which stages 1 to M - 1 begin, counted from 0.
        steps: the number of time steps of the network.
        stages: M.
        multiple: all cuts must be multiples of it.

    Raises:
        ValueError: if the cuts do not make M stages, do not rise, or are no multiples.

    >>> given_cuts([2, 5], steps=8, stages=3)
    (0, 2, 5, 8)
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
