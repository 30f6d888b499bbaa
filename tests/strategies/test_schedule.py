"""The critical path of DNI against cases that can be worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from sglight.strategies.schedule import StageTimes, period, speedup

STAGE = StageTimes(forward=1, estimate=0, backward=2, learn=0)


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_equal_stages_without_estimator_cost_scale_ideally(stages: int) -> None:
    assert speedup([STAGE] * stages, lag=1) == pytest.approx(stages)


def test_the_slowest_stage_sets_the_pace() -> None:
    stages = [STAGE, StageTimes(forward=2, backward=4), STAGE]
    assert period(stages, lag=1) == pytest.approx(6)
    assert speedup(stages, lag=1) == pytest.approx(12 / 6)


def test_the_estimator_is_paid_for() -> None:
    stages = [StageTimes(forward=1, estimate=0.5, backward=2, learn=1.5), STAGE]
    assert period(stages, lag=1) == pytest.approx(5)


def test_lag_zero_waits_for_the_true_gradient() -> None:
    # Stage 0 goes forward (1), then stage 1 does all of its batch (3), then stage 0 learns: locked.
    assert period([STAGE, STAGE], lag=0) == pytest.approx(4)
    assert speedup([STAGE, STAGE], lag=0) == pytest.approx(6 / 4)


def test_more_lag_never_slows_down() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        stages = [StageTimes(*torch.rand(4).tolist()) for _ in range(4)]
        periods = [period(stages, lag) for lag in range(5)]
        slowest = max(s.total for s in stages)
        assert all(a >= b - 1e-9 for a, b in pairwise(periods))
        assert periods[0] >= slowest - stages[-1].learn - 1e-9
