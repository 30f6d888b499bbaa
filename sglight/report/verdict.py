"""What a comparison comes to, in a few sentences by rule: the best settings, their price, and why a strategy loses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from statistics import fmean

from sglight.report import units
from sglight.report.groups import Group
from sglight.report.measures import BACKPROP, FIT, TARGET, Comparison, Measure, Row
from sglight.report.runs import Run

ACCURACIES = ("test/acc", "val/acc")
PHASE = re.compile(r"time/stage_\d+/(forward|estimate|backward|learn)_s")
WORKER = re.compile(r"worker_\d+/(busy|waiting|communicating)_s")
COSINES = (re.compile(r"stage_\d+/cosine"), re.compile(r"estimator_\d+/cosine"))
GOOD_COSINE = 0.98  # from it on, gradients explain nothing
WORTH_TELLING = 0.05  # parts of the time below it explain nothing


@dataclass(frozen=True)
class _Entry:
    group: Group
    row: Row

    @property
    def is_backprop(self) -> bool:
        return all(run.config.get("strategy") == "backprop" for run in self.group.runs)


def verdict(comparison: Comparison) -> str:
    """The best by accuracy and by time to the target, each against backpropagation, and why the best other one loses.

    Empty if no setting has results.
    """
    entries = [_Entry(*pair) for pair in zip(comparison.task.groups, comparison.rows, strict=True)]
    accuracy = next((m for key in ACCURACIES for m in comparison.measures if m.key == key), None)
    if accuracy is None:
        return ""
    entries = [entry for entry in entries if accuracy.key in entry.row]
    if len(entries) == 1:
        return f"Only {entries[0].group.label} has results: there is nothing to compare it with."
    yardsticks = [entry for entry in entries if entry.is_backprop]
    sentences = [_most_accurate(entries, yardsticks, accuracy)]
    sentences += [_first(comparison, entries, yardsticks), _why(entries, yardsticks, accuracy)]
    if not yardsticks:
        sentences.append("There is no run of strategy=backprop to measure them by.")
    return " ".join(sentence for sentence in sentences if sentence)


def _most_accurate(entries: Sequence[_Entry], yardsticks: Sequence[_Entry], measure: Measure) -> str:
    best = max(entries, key=lambda entry: entry.row[measure.key].mean)
    told = f"Most accurate is {best.group.label} with {measure.text(best.row[measure.key])} {measure.title}"
    if best.is_backprop or not yardsticks:
        return f"{told}."
    rival = max(yardsticks, key=lambda entry: entry.row[measure.key].mean)
    points = 100 * (best.row[measure.key].mean - rival.row[measure.key].mean)
    price = [f"{points:.2f} points above {rival.group.label}"]
    if FIT in best.row and FIT in rival.row:
        price.append(f"for {_times(best, rival, FIT)} its training time")
    return f"{told}, {' '.join(price)}."


def _first(comparison: Comparison, entries: Sequence[_Entry], yardsticks: Sequence[_Entry]) -> str:
    measure = next((m for m in comparison.measures if m.key == TARGET), None)
    fastest = comparison.best(measure) if measure else None
    if measure is None or fastest is None or comparison.target is None:
        return ""
    best = next(entry for entry in entries if TARGET in entry.row and entry.row[TARGET].mean == fastest)
    told = (
        f"First at {units.percent(comparison.target)} is {best.group.label}, "
        f"after {measure.text(best.row[TARGET])}"
    )
    rivals = [entry for entry in yardsticks if TARGET in entry.row]
    if best.is_backprop or not rivals:
        return f"{told}."
    rival = min(rivals, key=lambda entry: entry.row[TARGET].mean)
    return f"{told}, {_times(best, rival, TARGET)} the time of {rival.group.label}."


def _why(entries: Sequence[_Entry], yardsticks: Sequence[_Entry], measure: Measure) -> str:
    """Where backpropagation is better than the best of the others in accuracy or speed: the others' diagnosis."""
    others = [entry for entry in entries if not entry.is_backprop]
    if not yardsticks or not others:
        return ""
    best = max(others, key=lambda entry: entry.row[measure.key].mean)
    rival = max(yardsticks, key=lambda entry: entry.row[measure.key].mean)
    ours, theirs = best.row[measure.key], rival.row[measure.key]
    losses, reasons = list[str](), list[str]()
    if theirs.mean - ours.mean > hypot(theirs.std or 0, ours.std or 0) / sqrt(2):
        losses.append(f"{100 * (theirs.mean - ours.mean):.2f} points less accurate")
        reasons += _doubts(best.group.finished)
    if BACKPROP in best.row and best.row[BACKPROP].mean < 1:
        losses.append(f"{best.row[BACKPROP].mean:.2f} times as fast")
        reasons += _brakes(best.group.finished)
    if not losses:
        return ""
    told = f"{best.group.label} is {' and '.join(losses)}"
    return (
        f"{told}: {', '.join(reasons)}." if reasons else f"{told}; the diagnosis of its runs shows no reason."
    )


def _doubts(runs: Sequence[Run]) -> Iterator[str]:
    """What is wrong with the gradients of some runs, as far as they have measured it."""
    cosines = [value for run in runs if (value := _cosine(run)) is not None]
    if cosines and fmean(cosines) < GOOD_COSINE:
        yield f"the worst stage's gradients have a cosine of {fmean(cosines):.2f} with the exact ones"


def _brakes(runs: Sequence[Run]) -> Iterator[str]:
    """What takes the time of some runs besides the network, as far as they have measured it."""
    estimators = _part(runs, PHASE, ("estimate", "learn"))
    if estimators > WORTH_TELLING:
        yield f"estimators take {estimators:.0%} of the computing time"
    if any(run.config.get("trainer.devices", 1) != 1 for run in runs):
        waiting = _part(runs, WORKER, ("waiting", "communicating"))
        if waiting > WORTH_TELLING:
            yield f"workers wait or communicate for {waiting:.0%} of the time"
    elif any(run.config.get("strategy.stages", 1) != 1 for run in runs):
        yield "its stages take turns in one process"


def _cosine(run: Run) -> float | None:
    """The last cosine of the stage, or else the boundary, whose is the smallest."""
    for pattern in COSINES:
        last = [float(curve.value[-1]) for tag, curve in run.curves.items() if pattern.fullmatch(tag)]
        if last:
            return min(last)
    return None


def _part(runs: Sequence[Run], pattern: re.Pattern[str], kinds: Sequence[str]) -> float:
    """Which part of the times that fit a pattern is of these kinds, over all runs."""
    times = [(found[1], s) for r in runs for key, s in r.metrics.items() if (found := pattern.fullmatch(key))]
    whole = sum(seconds for _, seconds in times)
    return sum(seconds for kind, seconds in times if kind in kinds) / whole if whole else 0.0


def _times(entry: _Entry, rival: _Entry, key: str) -> str:
    return f"{entry.row[key].mean / rival.row[key].mean:.2f} times" if rival.row[key].mean else "?"
