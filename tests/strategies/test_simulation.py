"""Simulated workers keep the order of the algorithm, at the pace that can be worked out by hand."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglight.strategies.grid import schedule_grid
from sglight.strategies.schedule import Decoupled, Locked, Pipelined
from sglight.strategies.simulation import (
    Messages,
    Span,
    StageTimes,
    end_of,
    in_flight,
    period,
    simulate,
    speedup,
)
from tests.strategies.groups import grouped, groups_of, lags, stage_times

PLAIN = StageTimes(forward=1, estimate=0, backward=2, learn=0)
STAGE = StageTimes(forward=1, estimate=0, backward=2, learn=1)
LAST = StageTimes(forward=1, estimate=0, backward=2, learn=0)
LOCKED = Locked(lessons=True)
BATCHES = 8


def by_name(workers: list[list[Span]]) -> dict[tuple[str, int, int], Span]:
    """All spans but the waiting, by phase, stage and batch."""
    return {(s.phase, s.stage, s.batch): s for s in chain(*workers) if s.phase != "wait"}


def work(group: range, costs: list[StageTimes]) -> float:
    """What a worker does in a batch; the last stage has nothing to learn."""
    return sum(costs[i].total - (costs[i].learn if i == len(costs) - 1 else 0) for i in group)


def recurrence(stages: list[StageTimes], lag: int, batches: int = 64) -> float:
    """Seconds a batch with a worker a stage: the critical path, worked out stage by stage (Jaderberg et al. 2017)."""
    last = len(stages) - 1
    free = [0.0] * len(stages)
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


@settings(deadline=None)
@given(st.lists(stage_times, min_size=1, max_size=4), lags)
def test_a_stage_a_worker_is_the_critical_path(costs: list[StageTimes], lag: int) -> None:
    groups = groups_of(*[1] * len(costs))
    assert period(Decoupled(lag), groups, costs) == pytest.approx(recurrence(costs, lag), rel=1e-9)
    alone = sum(c.total for c in costs) - costs[-1].learn
    assert speedup(Decoupled(lag), groups, costs) == pytest.approx(alone / recurrence(costs, lag), rel=1e-9)


@settings(deadline=None)
@given(grouped(), lags)
def test_a_worker_does_everything_once_and_one_thing_at_a_time(
    case: tuple[list[range], list[StageTimes]], lag: int
) -> None:
    groups, costs = case
    workers = simulate(Decoupled(lag), groups, costs, BATCHES)
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
    spans = by_name(simulate(Decoupled(lag), *case, BATCHES))
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
    workers = simulate(Decoupled(lag), *case, BATCHES)
    ends = {s.end for s in by_name(workers).values()}
    assert all(s.end in ends for s in chain(*workers) if s.phase == "wait")


@settings(deadline=None)
@given(grouped(), st.integers(1, 3))
def test_with_a_lag_the_busiest_worker_sets_the_pace(
    case: tuple[list[range], list[StageTimes]], lag: int
) -> None:
    groups, costs = case
    slowest, batches = max(work(group, costs) for group in groups), 60
    behind = (
        max(spans[-1].end for spans in simulate(Decoupled(lag), groups, costs, batches)) - batches * slowest
    )
    # What is still to be learnt at the end, and the way to the last worker at the beginning.
    assert -lag * slowest <= behind <= sum(stage.total for stage in costs)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (1, 1, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("lag", [1, 2, 3])
def test_equal_stages_scale_with_the_smallest_groups(sizes: tuple[int, ...], lag: int) -> None:
    costs = [StageTimes(1, 0.25, 2, 0)] * sum(sizes)
    assert period(Decoupled(lag), groups_of(*sizes), costs) == pytest.approx(max(sizes) * 3.25)
    assert speedup(Decoupled(lag), groups_of(*sizes), costs) == pytest.approx(sum(sizes) / max(sizes))


@settings(deadline=None)
@given(grouped())
def test_without_a_lag_a_batch_waits_for_the_stage_behind(case: tuple[list[range], list[StageTimes]]) -> None:
    spans = by_name(simulate(Decoupled(0), *case, BATCHES))
    for (phase, i, t), span in spans.items():
        if phase == "forward" and t > 0 and i + 1 < len(case[1]):
            assert span.start >= spans["backward", i + 1, t - 1].end
            assert span.start >= spans["learn", i, t - 1].end


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_equal_stages_without_a_lag_learn_at_the_end_of_the_batch_behind(stages: int) -> None:
    spans = by_name(simulate(Decoupled(0), groups_of(*[1] * stages), [STAGE] * (stages - 1) + [LAST], 1))
    for i in range(stages - 1):
        # One forward pass later than its own backward pass.
        assert (
            spans["learn", i, 0].start == spans["backward", i + 1, 0].end == spans["backward", i, 0].end + 1
        )


@settings(deadline=None)
@given(grouped(), lags)
def test_one_worker_never_waits(case: tuple[list[range], list[StageTimes]], lag: int) -> None:
    costs = case[1]
    (spans,) = simulate(Decoupled(lag), [range(len(costs))], costs, BATCHES)
    assert all(span.phase != "wait" for span in spans)
    assert period(Decoupled(lag), [range(len(costs))], costs) == pytest.approx(work(range(len(costs)), costs))


def test_groups_must_hold_each_stage_once() -> None:
    with pytest.raises(AssertionError):
        simulate(Decoupled(1), [range(1), range(2, 3)], [STAGE] * 3, 1)


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
    assert period(LOCKED, groups, costs) == pytest.approx(locked_pace(costs), rel=1e-9)
    alone = sum(c.forward + c.backward for c in costs) + sum(c.learn for c in costs[:-1])
    assert speedup(LOCKED, groups, costs) == pytest.approx(alone / locked_pace(costs), rel=1e-9)


@settings(deadline=None)
@given(grouped())
def test_true_gradients_come_in_the_order_of_the_chain_rule(
    case: tuple[list[range], list[StageTimes]],
) -> None:
    groups, costs = case
    workers, last = simulate(LOCKED, groups, costs, BATCHES), len(costs) - 1
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
    assert "true gradients" in schedule_grid(LOCKED, groups, costs)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_equal_stages_without_estimator_cost_scale_ideally(stages: int) -> None:
    assert speedup(Decoupled(1), groups_of(*[1] * len([PLAIN] * stages)), [PLAIN] * stages) == pytest.approx(
        stages
    )


def test_the_slowest_stage_sets_the_pace() -> None:
    stages = [PLAIN, StageTimes(forward=2, backward=4), PLAIN]
    assert period(Decoupled(1), groups_of(*[1] * len(stages)), stages) == pytest.approx(6)
    assert speedup(Decoupled(1), groups_of(*[1] * len(stages)), stages) == pytest.approx(12 / 6)


def test_the_estimator_is_paid_for() -> None:
    stages = [StageTimes(forward=1, estimate=0.5, backward=2, learn=1.5), PLAIN]
    assert period(Decoupled(1), groups_of(*[1] * len(stages)), stages) == pytest.approx(5)


def test_lag_zero_waits_for_the_true_gradient() -> None:
    # Stage 0 goes forward (1), then stage 1 does all of its batch (3), then stage 0 learns: locked.
    assert period(Decoupled(0), groups_of(*[1] * len([PLAIN, PLAIN])), [PLAIN, PLAIN]) == pytest.approx(4)
    assert speedup(Decoupled(0), groups_of(*[1] * len([PLAIN, PLAIN])), [PLAIN, PLAIN]) == pytest.approx(
        6 / 4
    )


def test_more_lag_never_slows_down() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        stages = [StageTimes(*torch.rand(4).tolist()) for _ in range(4)]
        periods = [period(Decoupled(lag), groups_of(1, 1, 1, 1), stages) for lag in range(5)]
        slowest = max(s.total for s in stages)
        assert all(a >= b - 1e-9 for a, b in pairwise(periods))
        assert periods[0] >= slowest - stages[-1].learn - 1e-9


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("lag", [0, 1, 2, 7])
def test_a_channel_holds_what_a_lag_lets_a_stage_run_ahead(stages: int, lag: int) -> None:
    # A stage is at most lag + 1 batches ahead of the next, which may hold one tensor more.
    assert in_flight(Decoupled(lag), stages) == lag + 2


def test_true_gradients_keep_one_tensor_on_its_way_and_one_in_hand() -> None:
    assert in_flight(Locked(), 4) == in_flight(LOCKED, 4) == 2
    assert in_flight(Locked(), 1) == 0


def test_messages_delay_what_needs_them() -> None:
    costs, groups = [PLAIN, PLAIN], groups_of(1, 1)
    spans = simulate(Locked(), groups, costs, 1, Messages(states=[5.0]))
    # Forward, 5 on the way, forward and backward, 5 on the way, backward.
    assert end_of(spans) == 1 + 5 + 1 + 2 + 5 + 2
    # A piece is away for 1 + 3 + 1, between its two passes of 3 above: as many are on the way as the delay says.
    assert period(Pipelined(), groups, costs, Messages(states=[1.0])) == pytest.approx(8 / 2)
    assert period(Pipelined(slack=1), groups, costs, Messages(states=[1.0])) == pytest.approx(3)
    # The line carries one after the other.
    assert period(Pipelined(slack=1), groups, costs, Messages(states=[7.0])) == pytest.approx(7)


def test_sums_over_replicas_hide_behind_the_passes_of_other_stages() -> None:
    costs, one = [PLAIN, PLAIN], groups_of(2)
    # The last stage goes backward first, and its sum is done when the first stage is.
    assert period(Locked(), one, costs, Messages(sums=[0.0, 2.0])) == pytest.approx(6)
    assert period(Locked(), one, costs, Messages(sums=[1.5, 0.0])) == pytest.approx(7.5)
