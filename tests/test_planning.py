"""The best split of workers, where it can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sglight import planning
from sglight.errors import UserError
from sglight.planning import (
    Machines,
    Split,
    evaluate,
    message_seconds,
    parameter_counts,
    parsed,
    show,
    stage_seconds,
)
from sglight.strategies.backprop import Backprop
from sglight.strategies.delayed import Delayed
from tests.strategies.common import ADAM, NETWORK

DEEP = {**NETWORK, "channels": 16, "steps": 32, "opening": "pad"}
FAST = {"bandwidth": 1e18, "latency": 1e-12}
SAMPLES = 64


def split(module: Any, groups: int, replicas: int, **machines: Any) -> Split:
    settings = Machines(workers=groups * replicas, flops=1e9, **machines)
    costs = stage_seconds(module, SAMPLES, replicas, settings)
    return evaluate(module.plan, module.groups(groups), replicas, SAMPLES, costs, settings)


def delayed(stages: int, pieces: int) -> Delayed:
    return Delayed(DEEP, ADAM, stages=stages, microbatches=pieces)


def alone() -> Split:
    return split(Backprop(DEEP, ADAM), 1, 1, **FAST)


def test_a_worker_takes_two_operations_a_multiplication() -> None:
    work = sum(Backprop(DEEP, ADAM).spec.step_work())
    assert alone().batch_s == pytest.approx(3 * 2 * work * SAMPLES / 1e9)
    assert alone().bound == "computing"


@pytest.mark.parametrize(("groups", "replicas"), [(4, 1), (1, 4), (2, 2), (4, 4)])
def test_where_messages_are_free_all_workers_work(groups: int, replicas: int) -> None:
    found = split(delayed(4, 4), groups, replicas, **FAST)
    assert found.batch_s == pytest.approx(
        alone().batch_s / groups / replicas, rel=0.1
    )  # the stages are not quite equal
    assert found.bound == "computing"


def test_a_flushed_pipeline_waits() -> None:
    found = split(Backprop(DEEP, ADAM, stages=4, microbatches=4), 4, 1, **FAST)
    assert found.batch_s == pytest.approx(alone().batch_s * 7 / 16, rel=0.1)  # m + M - 1 rounds of m M
    assert found.bound.startswith("waiting")


def test_what_bounds_a_split() -> None:
    assert split(delayed(2, 1), 2, 1, bandwidth=1e4, latency=1e-12).bound == "messages"
    assert split(delayed(1, 1), 1, 2, bandwidth=1e4, latency=1e-12).bound == "sums"
    shared = split(delayed(2, 1), 2, 2, cores=2, **FAST)
    assert shared.bound == "cores"
    assert shared.batch_s == pytest.approx(alone().batch_s / 2)


def test_sums_go_in_a_ring() -> None:
    module = delayed(1, 1)
    (count,) = parameter_counts(module.spec, module.cuts)
    assert count == sum(p.numel() for p in planning.Stage(module.spec).parameters())
    messages = message_seconds(module.plan, SAMPLES, 4, Machines(bandwidth=100.0, latency=1e-9))
    assert messages.sums == [pytest.approx(2 * 3 / 4 * 4 * count / 100)]


def test_more_pieces_and_replicas_take_less_memory() -> None:
    one = split(delayed(4, 1), 4, 1, **FAST).memory
    assert split(delayed(4, 4), 4, 1, **FAST).memory < one
    assert split(delayed(4, 1), 4, 2, **FAST).memory < one


def test_only_a_strategy_with_microbatches_is_told_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    found = [split(delayed(2, 2), 2, 1)]
    for in_pieces in (True, False):
        show(found, Machines(), SAMPLES, in_pieces)
        assert ("strategy.microbatches=" in capsys.readouterr().out) is in_pieces


def test_sums_cost_time_where_no_core_is_free() -> None:
    free, shared = (
        split(delayed(1, 1), 1, 2, bandwidth=1e5, latency=1e-12, **more) for more in ({}, {"cores": 2})
    )
    (sums,) = message_seconds(
        delayed(1, 1).plan, SAMPLES // 2, 2, Machines(bandwidth=1e5, latency=1e-12)
    ).sums
    computing = sum(cost.total for cost in stage_seconds(delayed(1, 1), SAMPLES, 2, Machines(flops=1e9)))
    assert shared.batch_s == pytest.approx(computing + sums)
    assert free.batch_s <= shared.batch_s


def test_mistakes_name_the_key() -> None:
    with pytest.raises(UserError, match=r"^plan\.bandwith is unknown; did you mean plan\.bandwidth\?$"):
        parsed(["plan.bandwith=1"])
    with pytest.raises(UserError, match=r"^plan\.workers=four is not allowed; it must be a whole number$"):
        parsed(["plan.workers=four"])
    with pytest.raises(UserError, match=r"plan\.workers=0 must be above 0"):
        parsed(["plan.workers=0"])
    with pytest.raises(UserError, match=r"plan\.split=\[1, 2\] must be \[groups, replicas, pieces\]"):
        parsed(["plan.split=[1,2]"])
    machines, cfg, free = parsed(["plan.workers=8", "strategy.stages=4", "plan.split=[4,2,1]"])
    assert (machines.split, cfg.strategy.stages, free) == ([4, 2, 1], 4, False)
