"""Means of curves against sums by hand."""

from dataclasses import replace

import numpy as np
import pytest

from sglight.report.curves import BOUNDARY, POINTS, STEP, average, by_epoch, by_number, learning, numbered
from sglight.report.events import Curve
from sglight.report.groups import tasks
from tests.report.test_groups import run


def curve(step, value, elapsed=None) -> Curve:
    step = np.array(step, dtype=float)
    return Curve(step, step / 10 if elapsed is None else np.array(elapsed), np.array(value, dtype=float))


def group(*curves: dict[str, Curve], state: str = "finished"):
    (task,) = tasks([replace(run(seed=i, state=state), curves=c) for i, c in enumerate(curves)])
    return task.groups[0]


def test_mean_deviation_and_time_at_equal_steps():
    mean = average([curve([0, 10], [1, 3], [0.0, 2.0]), curve([0, 10], [2, 7], [0.0, 4.0])])
    assert list(mean.x) == [0, 10] and list(mean.mean) == [1.5, 5.0]
    assert mean.std == pytest.approx([np.std([1, 2], ddof=1), np.std([3, 7], ddof=1)])
    assert list(mean.elapsed) == [0.0, 3.0] and mean.n == 2


def test_the_mean_goes_as_far_as_all_curves_and_no_further():
    mean = average([curve([0, 10, 20], [0, 1, 2]), curve([5, 15], [0.5, 1.5])])
    assert list(mean.x) == [5, 10, 15]
    assert mean.mean == pytest.approx([0.5, 1.0, 1.5]) and mean.std == pytest.approx([0, 0, 0])
    assert average([curve([0, 1], [0, 0]), curve([5], [0])]) is None
    assert average([]) is None


def test_many_points_are_thinned_to_means():
    n = 10 * POINTS
    mean = average([curve(np.arange(n), np.arange(n) % 2)])
    assert len(mean.x) == POINTS
    assert mean.mean == pytest.approx(np.full(POINTS, 0.5))
    assert mean.x.mean() == pytest.approx((n - 1) / 2)


def test_unfinished_runs_are_shown_only_where_nothing_finished():
    a, b = {"a": curve([0], [1.0])}, {"a": curve([0], [3.0])}
    assert learning(group(a, b, state="running"), "a").mean == [2.0]
    (task,) = tasks([replace(run(seed=1), curves=a), replace(run(seed=2, state="failed"), curves=b)])
    assert learning(task.groups[0], "a").mean == [1.0]


def test_values_are_averaged_within_an_epoch():
    curves = {
        "epoch": curve([9, 19, 29, 39], [0, 0, 1, 1]),
        "boundary_0/cosine": curve([9, 19, 29], [0.2, 0.4, 0.8]),
    }
    mean = by_epoch(group(curves), "boundary_0/cosine")
    assert list(mean.x) == [1, 2] and mean.mean == pytest.approx([0.3, 0.8])


def test_last_values_by_boundary_and_by_step():
    tags = {f"boundary_{i}/cosine": curve([0, 1], [0.0, i / 4]) for i in (0, 1, 10)}
    tags |= {f"stability/step_{j}/sigma_max": curve([0], [1.0 + j]) for j in range(3)}
    one = group(tags)
    mean = by_number(one, BOUNDARY, "cosine")
    assert list(mean.x) == [0, 1, 10] and list(mean.mean) == [0.0, 0.25, 2.5]
    assert list(by_number(one, STEP, "sigma_max").mean) == [1, 2, 3]
    assert by_number(one, STEP, "nothing") is None
    assert numbered([one], BOUNDARY) == {"cosine": [0, 1, 10]}
