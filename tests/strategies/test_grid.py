"""The text grid shows what simulated workers do."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sglight.strategies.grid import schedule_grid
from sglight.strategies.schedule import Decoupled
from sglight.strategies.simulation import StageTimes
from tests.strategies.groups import grouped, groups_of, lags

STAGE = StageTimes(forward=1, estimate=0, backward=2, learn=1)
LAST = StageTimes(forward=1, estimate=0, backward=2, learn=0)


def test_the_grid_of_a_stage_a_worker() -> None:
    assert schedule_grid(Decoupled(1), groups_of(1, 1), [STAGE, LAST], batches=3, width=65).splitlines() == [
        "2 workers, 2 stages, lag 1: the first 3 batches, a column is 0.2",
        "worker 0  F0-- B0------- F1-- B1------- L0-- F2-- B2------- L1--",
        "worker 1  .....F0-- B0------- F1-- B1------- .....F2-- B2-------",
        "[stage] F forward, E estimate, B backward, L learn [batch]; | one of these, short; . waits",
        "lag 1: an estimator learns from batch t after batch t + 1, and waits for nobody",
        "a batch every 4, with one worker every 7: 1.75 times as fast",
    ]


def test_a_replica_has_its_part_of_each_batch() -> None:
    lines = schedule_grid(Decoupled(1), groups_of(1, 1), [STAGE, LAST], replicas=2).splitlines()
    assert lines[0].startswith("2 workers in each of 2 replicas, 2 stages, lag 1:")
    assert lines[-1] == "a batch every 2, with one worker every 7: 3.50 times as fast"


def test_the_grid_of_several_stages_a_worker_goes_on_below() -> None:
    # 0L1 would just not fit.
    lines = schedule_grid(
        Decoupled(0), groups_of(2, 2), [STAGE] * 3 + [LAST], batches=2, width=68
    ).splitlines()
    assert lines[1:-3] == [
        "worker 0  0F0 0B0---- 1F0 1B0---- 0L0 1L0 0F1 0B1---- 1F1 1B1----",
        "worker 1  ................2F0 2B0---- 3F0 3B0---- 2L0 ....2F1 2B1-",
        "",
        "worker 0  0L1 1L1",
        "worker 1  --- 3F1 3B1---- 2L1",
    ]


def test_a_long_grid_has_three_parts() -> None:
    rows = schedule_grid(Decoupled(1), groups_of(1, 1), [STAGE, LAST], batches=200).splitlines()[1:-3]
    assert [bool(row) for row in rows] == [True, True, False, True, True, False, True, True]


@settings(max_examples=50, deadline=None)
@given(grouped(), lags, st.integers(1, 20), st.integers(60, 120))
def test_any_grid_fits(
    case: tuple[list[range], list[StageTimes]], lag: int, batches: int, width: int
) -> None:
    header, *rows, legend, lag_, pace = schedule_grid(Decoupled(lag), *case, batches, width).splitlines()
    assert all(len(row) <= width for row in rows)
    assert max(map(len, (header, legend, lag_, pace))) <= 100
    names = [row.split("  ")[0] for row in rows if row]
    assert len(names) % len(case[0]) == 0 and set(names) == {f"worker {w}" for w in range(len(case[0]))}
