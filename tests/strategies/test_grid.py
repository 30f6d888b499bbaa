"""Simulated workers keep the order of the algorithm, and the grid shows what they do."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglight.strategies.grid import group_period, group_speedup, schedule_grid, simulate
from sglight.strategies.schedule import Span, StageTimes, period, speedup

STAGE = StageTimes(forward=1, estimate=0, backward=2, learn=1)
LAST = StageTimes(forward=1, estimate=0, backward=2, learn=0)
BATCHES = 8

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


def by_name(workers: list[list[Span]]) -> dict[tuple[str, int, int], Span]:
    """All spans but the waiting, by phase, stage and batch."""
    return {(s.phase, s.stage, s.batch): s for s in chain(*workers) if s.phase != "wait"}


def work(group: range, costs: list[StageTimes]) -> float:
    """What a worker does in a batch; the last stage has nothing to learn."""
    return sum(costs[i].total - (costs[i].learn if i == len(costs) - 1 else 0) for i in group)


@settings(deadline=None)
@given(st.lists(stage_times, min_size=1, max_size=4), lags)
def test_a_stage_a_worker_is_the_known_schedule(costs: list[StageTimes], lag: int) -> None:
    groups = groups_of(*[1] * len(costs))
    assert group_period(groups, costs, lag) == pytest.approx(period(costs, lag), rel=1e-9)
    costs[-1].learn = 0
    assert group_speedup(groups, costs, lag) == pytest.approx(speedup(costs, lag), rel=1e-9)


@settings(deadline=None)
@given(grouped(), lags)
def test_a_worker_does_everything_once_and_one_thing_at_a_time(
    case: tuple[list[range], list[StageTimes]], lag: int
) -> None:
    groups, costs = case
    workers = simulate(groups, costs, lag, BATCHES)
    for spans, group in zip(workers, groups, strict=True):
        assert spans[0].start == 0
        assert all(a.end == b.start and a.start < a.end for a, b in pairwise(spans))
        found = Counter((s.phase, s.stage) for s in spans if s.phase != "wait")
        for i in group:
            assert all(found.pop((phase, i)) == BATCHES for phase in ("forward", "estimate", "backward"))
            assert found.pop(("learn", i), 0) == (BATCHES - lag if i < len(costs) - 1 else 0)
        assert not found
    for (phase, i, _), span in by_name(workers).items():
        assert span.end - span.start == pytest.approx(getattr(costs[i], phase))


@settings(deadline=None)
@given(grouped(), lags)
def test_nothing_begins_before_what_it_needs(case: tuple[list[range], list[StageTimes]], lag: int) -> None:
    spans = by_name(simulate(*case, lag, BATCHES))
    for (phase, i, t), span in spans.items():
        if phase == "forward" and i > 0:
            assert span.start >= spans["forward", i - 1, t].end
        if phase == "learn":
            assert span.start >= spans["backward", i + 1, t].end
            assert span.start >= spans["backward", i, t + lag].end
            if (later := spans.get(("forward", i, t + lag + 1))) is not None:
                assert later.start >= span.end


@settings(deadline=None)
@given(grouped(), lags)
def test_a_worker_waits_no_longer_than_it_must(case: tuple[list[range], list[StageTimes]], lag: int) -> None:
    workers = simulate(*case, lag, BATCHES)
    ends = {s.end for s in by_name(workers).values()}
    assert all(s.end in ends for s in chain(*workers) if s.phase == "wait")


@settings(deadline=None)
@given(grouped(), st.integers(1, 3))
def test_with_a_lag_the_busiest_worker_sets_the_pace(
    case: tuple[list[range], list[StageTimes]], lag: int
) -> None:
    groups, costs = case
    slowest, batches = max(work(group, costs) for group in groups), 60
    behind = max(spans[-1].end for spans in simulate(groups, costs, lag, batches)) - batches * slowest
    # What is still to be learnt at the end, and the way to the last worker at the beginning.
    assert -lag * slowest <= behind <= sum(stage.total for stage in costs)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (1, 1, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_equal_stages_scale_with_the_smallest_groups(sizes: tuple[int, ...], lag: int) -> None:
    costs = [StageTimes(1, 0.25, 2, 0)] * sum(sizes)
    assert group_period(groups_of(*sizes), costs, lag) == pytest.approx(max(sizes) * 3.25)
    assert group_speedup(groups_of(*sizes), costs, lag) == pytest.approx(sum(sizes) / max(sizes))


@settings(deadline=None)
@given(grouped())
def test_without_a_lag_a_batch_waits_for_the_stage_behind(case: tuple[list[range], list[StageTimes]]) -> None:
    spans = by_name(simulate(*case, 0, BATCHES))
    for (phase, i, t), span in spans.items():
        if phase == "forward" and t > 0 and i + 1 < len(case[1]):
            assert span.start >= spans["backward", i + 1, t - 1].end
            assert span.start >= spans["learn", i, t - 1].end


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_equal_stages_without_a_lag_learn_at_the_end_of_the_batch_behind(stages: int) -> None:
    spans = by_name(simulate(groups_of(*[1] * stages), [STAGE] * (stages - 1) + [LAST], 0, 1))
    for i in range(stages - 1):
        # One forward pass later than its own backward pass.
        assert (
            spans["learn", i, 0].start == spans["backward", i + 1, 0].end == spans["backward", i, 0].end + 1
        )


@settings(deadline=None)
@given(grouped(), lags)
def test_one_worker_never_waits(case: tuple[list[range], list[StageTimes]], lag: int) -> None:
    costs = case[1]
    (spans,) = simulate([range(len(costs))], costs, lag, BATCHES)
    assert all(span.phase != "wait" for span in spans)
    assert group_period([range(len(costs))], costs, lag) == pytest.approx(work(range(len(costs)), costs))


def test_groups_must_hold_each_stage_once() -> None:
    with pytest.raises(AssertionError):
        simulate([range(1), range(2, 3)], [STAGE] * 3, 1, 1)


def test_the_grid_of_a_stage_a_worker() -> None:
    assert schedule_grid(groups_of(1, 1), [STAGE, LAST], lag=1, batches=3, width=65).splitlines() == [
        "2 workers, 2 stages, lag 1: the first 3 batches, a column is 0.2",
        "worker 0  F0-- B0------- F1-- B1------- L0-- F2-- B2------- L1--",
        "worker 1  .....F0-- B0------- F1-- B1------- .....F2-- B2-------",
        "[stage] F forward, E estimate, B backward, L learn [batch]; | one of these, short; . waits",
        "a batch every 4, with one worker every 7: 1.75 times as fast",
    ]


def test_the_grid_of_several_stages_a_worker_goes_on_below() -> None:
    # 0L1 would just not fit.
    lines = schedule_grid(groups_of(2, 2), [STAGE] * 3 + [LAST], lag=0, batches=2, width=68).splitlines()
    assert lines[1:-2] == [
        "worker 0  0F0 0B0---- 1F0 1B0---- 0L0 1L0 0F1 0B1---- 1F1 1B1----",
        "worker 1  ................2F0 2B0---- 3F0 3B0---- 2L0 ....2F1 2B1-",
        "",
        "worker 0  0L1 1L1",
        "worker 1  --- 3F1 3B1---- 2L1",
    ]


def test_a_long_grid_has_three_parts() -> None:
    rows = schedule_grid(groups_of(1, 1), [STAGE, LAST], lag=1, batches=200).splitlines()[1:-2]
    assert [bool(row) for row in rows] == [True, True, False, True, True, False, True, True]


@settings(max_examples=50, deadline=None)
@given(grouped(), lags, st.integers(1, 20), st.integers(60, 120))
def test_any_grid_fits(
    case: tuple[list[range], list[StageTimes]], lag: int, batches: int, width: int
) -> None:
    header, *rows, legend, pace = schedule_grid(*case, lag, batches, width).splitlines()
    assert all(len(row) <= width for row in rows)
    assert max(map(len, (header, legend, pace))) <= 100
    names = [row.split("  ")[0] for row in rows if row]
    assert len(names) % len(case[0]) == 0 and set(names) == {f"worker {w}" for w in range(len(case[0]))}


def locked_pace(costs: list[StageTimes]) -> float:
    """What a batch takes with true gradients and a worker a stage: lessons hide behind the later stages.

    The time from the state's arrival at a stage until its gradient leaves, from the last stage to the first.
    """
    pace = 0.0
    for i, stage in reversed(list(enumerate(costs))):
        lesson = stage.learn if i + 1 < len(costs) else 0.0
        pace = stage.forward + max(pace, lesson) + stage.backward
    return pace


@settings(deadline=None)
@given(st.lists(stage_times, min_size=1, max_size=4))
def test_true_gradients_lock_all_but_the_lessons(costs: list[StageTimes]) -> None:
    groups = groups_of(*[1] * len(costs))
    assert group_period(groups, costs, None) == pytest.approx(locked_pace(costs), rel=1e-9)
    alone = sum(c.forward + c.backward for c in costs) + sum(c.learn for c in costs[:-1])
    assert group_speedup(groups, costs, None) == pytest.approx(alone / locked_pace(costs), rel=1e-9)


@settings(deadline=None)
@given(grouped())
def test_true_gradients_come_in_the_order_of_the_chain_rule(
    case: tuple[list[range], list[StageTimes]],
) -> None:
    groups, costs = case
    workers, last = simulate(groups, costs, None, BATCHES), len(costs) - 1
    spans = by_name(workers)
    for own in workers:
        assert all(a.end <= b.start for a, b in pairwise(own))
    for t in range(BATCHES):
        for i in range(last):
            assert spans["forward", i, t].end <= spans["forward", i + 1, t].start
            assert spans["backward", i + 1, t].end <= spans["backward", i, t].start
        assert spans["forward", last, t].end <= spans["backward", last, t].start
        for i in range(last):
            if t:
                assert spans["backward", i, t - 1].end <= spans["learn", i, t - 1].start
    assert "true gradients" in schedule_grid(groups, costs, None)
