"""The conclusion of a comparison in a few sentences: the best settings, their price, and why a strategy is worse."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from statistics import fmean
from typing import Any

from sglight import units
from sglight.report.groups import Group
from sglight.report.measures import BACKPROP, FIT, TARGET, Comparison, Measure, Row
from sglight.report.runs import Run

ACCURACIES = ("test/acc", "val/acc")
PHASE = re.compile(r"time/stage_\d+/(forward|estimate|backward|learn)_s")
WORKER = re.compile(r"worker_\d+/(busy|waiting|communicating)_s")
COSINES = (re.compile(r"stage_\d+/cosine"), re.compile(r"estimator_\d+/cosine"))
GOOD_COSINE = 0.98  # gradients with a cosine above it are no reason for a lower accuracy
SMALL_SHARE = 0.05  # smaller parts of the time are no reason for a lower speed


@dataclass(frozen=True)
class _Entry:
    """A group with its statistics."""

    group: Group
    row: Row

    @property
    def is_backprop(self) -> bool:
        """Whether all of its runs are backpropagation."""
        return all(run.config.get("strategy") == "backprop" for run in self.group.runs)

    @property
    def network(self) -> dict[str, Any]:
        """The keys of the network, those of the first run."""
        return {key: value for key, value in self.group.runs[0].config.items() if key.startswith("model")}


def verdict(comparison: Comparison) -> str:
    """Sentences about the most accurate group and the fastest to the target, each compared with backpropagation.

    If backpropagation is better than every other group, the diagnosis of the best other group follows. Empty if no
    group has results.
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
        sentences.append("There is no run of strategy=backprop among these to measure them by.")
    return " ".join(sentence for sentence in sentences if sentence)


def _most_accurate(entries: Sequence[_Entry], yardsticks: Sequence[_Entry], measure: Measure) -> str:
    best = max(entries, key=lambda entry: entry.row[measure.key].mean)
    sentence = (
        f"Most accurate is {best.group.label} with {measure.text(best.row[measure.key])} {measure.title}"
    )
    if best.is_backprop or not yardsticks:
        return f"{sentence}."
    rival = max(yardsticks, key=lambda entry: entry.row[measure.key].mean)
    points = 100 * (best.row[measure.key].mean - rival.row[measure.key].mean)
    price = [f"{points:.2f} points above {rival.group.label}"]
    if FIT in best.row and FIT in rival.row:
        price.append(f"for {_times(best, rival, FIT)} its training time")
    return f"{sentence}, {' '.join(price)}."


def _first(comparison: Comparison, entries: Sequence[_Entry], yardsticks: Sequence[_Entry]) -> str:
    target, runs = comparison.target, [run for entry in entries for run in entry.group.finished]
    if target is not None and all(run.metrics.get("val/acc", 1.0) < target for run in runs):
        return f"No run reaches {units.percent(target)} validation accuracy."
    measure = next((m for m in comparison.measures if m.key == TARGET), None)
    fastest = comparison.best(measure) if measure else None
    if measure is None or fastest is None or target is None:
        return ""
    best = next(entry for entry in entries if TARGET in entry.row and entry.row[TARGET].mean == fastest)
    sentence = (
        f"First at {units.percent(target)} is {best.group.label}, after {measure.text(best.row[TARGET])}"
    )
    rivals = [entry for entry in yardsticks if TARGET in entry.row]
    if best.is_backprop or not rivals:
        return f"{sentence}."
    rival = min(rivals, key=lambda entry: entry.row[TARGET].mean)
    return f"{sentence}, {_times(best, rival, TARGET)} the time of {rival.group.label}."


def _why(entries: Sequence[_Entry], yardsticks: Sequence[_Entry], measure: Measure) -> str:
    """Why the best group that is not backpropagation is less accurate or slower than that; empty if it is not."""
    others = [entry for entry in entries if not entry.is_backprop]
    if not yardsticks or not others:
        return ""
    best = max(others, key=lambda entry: entry.row[measure.key].mean)
    alike = [entry for entry in yardsticks if entry.network == best.network]
    rival = max(alike or yardsticks, key=lambda entry: entry.row[measure.key].mean)
    ours, theirs = best.row[measure.key], rival.row[measure.key]
    losses, reasons = list[str](), list[str]()
    if theirs.mean - ours.mean > hypot(theirs.std or 0, ours.std or 0) / sqrt(2):
        than = f" than {rival.group.label}" if len(yardsticks) > 1 else ""
        losses.append(f"{100 * (theirs.mean - ours.mean):.2f} points less accurate{than}")
        reasons += _doubts(best.group.finished)
    if BACKPROP in best.row and best.row[BACKPROP].mean < 1:
        losses.append(f"{best.row[BACKPROP].mean:.2f} times as fast")
        reasons += _brakes(best.group.finished)
    if not losses:
        return ""
    sentence = f"{best.group.label} is {' and '.join(losses)}"
    reason = f": {', '.join(reasons)}" if reasons else "; the diagnosis of its runs shows no reason"
    return f"{sentence}{reason}."


def _doubts(runs: Sequence[Run]) -> Iterator[str]:
    """What is wrong with the gradients of some runs, as far as they measured it."""
    cosines = [value for run in runs if (value := _cosine(run)) is not None]
    if cosines and fmean(cosines) < GOOD_COSINE:
        yield f"the worst stage's gradients have a cosine of {fmean(cosines):.2f} with the exact ones"


def _brakes(runs: Sequence[Run]) -> Iterator[str]:
    """What takes time in some runs besides the network, as far as they measured it."""
    estimators = _part(runs, PHASE, ("estimate", "learn"))
    if estimators > SMALL_SHARE:
        yield f"estimators take {units.share(estimators)} of the computing time"
    if any(run.config.get("trainer.devices", 1) != 1 for run in runs):
        waiting = _part(runs, WORKER, ("waiting", "communicating"))
        if waiting > SMALL_SHARE:
            yield f"workers wait or communicate for {units.share(waiting)} of the time"
    elif any(run.config.get("strategy.stages", 1) != 1 for run in runs):
        yield "its stages take turns in one process"


def _cosine(run: Run) -> float | None:
    """The smallest of the last cosines of all stages; of boundaries if stages have none."""
    for pattern in COSINES:
        last = [float(curve.value[-1]) for tag, curve in run.curves.items() if pattern.fullmatch(tag)]
        if last:
            return min(last)
    return None


def _part(runs: Sequence[Run], pattern: re.Pattern[str], kinds: Sequence[str]) -> float:
    """The part of these kinds in all times whose names match a pattern, over all runs."""
    times = [(found[1], s) for r in runs for key, s in r.metrics.items() if (found := pattern.fullmatch(key))]
    whole = sum(seconds for _, seconds in times)
    return sum(seconds for kind, seconds in times if kind in kinds) / whole if whole else 0.0


def _times(entry: _Entry, rival: _Entry, key: str) -> str:
    return f"{entry.row[key].mean / rival.row[key].mean:.2f} times" if rival.row[key].mean else "?"
