"""Averages the curves of several runs: mean and standard deviation at equal steps."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sglight.report.events import Curve
from sglight.report.groups import Group
from sglight.report.runs import Run

POINTS = 150  # curves with more points are thinned

# `boundary_0/cosine`: boundary and measure. `stability/step_3/sigma_max`: step and measure.
BOUNDARY = re.compile(r"boundary_(\d+)/(\w+)")
STEP = re.compile(r"stability/step_(\d+)/(\w+)")
FLOW = re.compile(r"stability/(\w+)")


class Mean(NamedTuple):
    """The mean of n curves; all arrays have shape ``[N]``.

    Attributes:
        x: steps, epochs or whatever the curves are drawn over.
        elapsed: mean seconds of training at the same points; NaN where they are not known.
        mean: mean of the values.
        std: sample standard deviation of the values; 0 for a single curve.
        n: how many curves.
    """

    x: np.ndarray
    elapsed: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    n: int


def average(curves: Sequence[Curve]) -> Mean | None:
    """The mean of curves over the steps that all of them cover; None if there are none."""
    curves = [curve for curve in curves if len(curve.step)]
    if not curves:
        return None
    steps = np.unique(np.concatenate([curve.step for curve in curves]))
    begin, end = max(c.step[0] for c in curves), min(c.step[-1] for c in curves)
    steps = steps[(steps >= begin) & (steps <= end)]
    if not len(steps):
        return None
    values = np.stack([np.interp(steps, c.step, c.value) for c in curves])
    elapsed = np.stack([np.interp(steps, c.step, c.elapsed) for c in curves]).mean(0)
    std = values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(steps))
    x, elapsed, mean, std = (_thinned(each) for each in (steps, elapsed, values.mean(0), std))
    return Mean(x, elapsed, mean, std, len(curves))


def shown(group: Group) -> Sequence[Run]:
    """The runs whose curves are averaged for a group: the finished ones, or all if none is finished."""
    return group.finished or group.runs


def learning(group: Group, tag: str) -> Mean | None:
    """The mean curve of a scalar over the batches."""
    return average([run.curves[tag] for run in shown(group) if tag in run.curves])


def by_epoch(group: Group, tag: str) -> Mean | None:
    """The mean curve of a scalar over the epochs; its values within an epoch are averaged."""
    return average(
        [_epochs(run, run.curves[tag]) for run in shown(group) if {tag, "epoch"} <= run.curves.keys()]
    )


def by_number(group: Group, pattern: re.Pattern[str], measure: str) -> Mean | None:
    """The last value of a measure for each number in its tags: over boundaries or over time steps."""
    profiles = []
    for run in shown(group):
        last = {
            int(found[1]): float(curve.value[-1])
            for tag, curve in run.curves.items()
            if (found := pattern.fullmatch(tag)) and found[2] == measure
        }
        numbers = np.array(sorted(last), dtype=float)
        profiles.append(
            Curve(numbers, np.full(len(numbers), np.nan), np.array([last[int(k)] for k in numbers]))
        )
    return average(profiles)


def numbered(groups: Sequence[Group], pattern: re.Pattern[str]) -> dict[str, list[int]]:
    """The measures whose tags match a pattern, with the numbers (of boundaries or steps) that each has."""
    found: dict[str, set[int]] = defaultdict(set)
    for tag in (tag for group in groups for run in shown(group) for tag in run.curves):
        if match := pattern.fullmatch(tag):
            found[match[2]].add(int(match[1]))
    return {measure: sorted(numbers) for measure, numbers in found.items()}


def _epochs(run: Run, curve: Curve) -> Curve:
    """A curve over epochs, from one over batches and the run's curve of the epoch."""
    clock = run.curves["epoch"]
    at = np.searchsorted(clock.step, curve.step, side="right") - 1
    epoch = clock.value[np.maximum(at, 0)] + 1
    numbers = np.unique(epoch)
    elapsed, value = (
        np.array([each[epoch == k].mean() for k in numbers]) for each in (curve.elapsed, curve.value)
    )
    return Curve(numbers, elapsed, value)


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most `POINTS` values, by averaging neighbours."""
    if len(values) <= POINTS:
        return values
    return np.array([part.mean() for part in np.array_split(values, POINTS)])
