"""Workers with random numbers of stages, of random costs."""

from __future__ import annotations

from hypothesis import strategies as st

from sglight.strategies.simulation import StageTimes

cost = st.floats(0.1, 3.0)
stage_times = st.builds(StageTimes, cost, cost, cost, cost)
lags = st.integers(0, 3)


@st.composite
def grouped(draw: st.DrawFn) -> tuple[list[range], list[StageTimes]]:
    """One to four workers, stages with costs for all of them."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    return groups_of(*sizes), draw(st.lists(stage_times, min_size=sum(sizes), max_size=sum(sizes)))


def groups_of(*sizes: int) -> list[range]:
    """Neighbouring stages, so many for each worker."""
    ends = [sum(sizes[: w + 1]) for w in range(len(sizes))]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
