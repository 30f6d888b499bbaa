"""The charts of a comparison, and the colour of each group in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from sglight.report.charts import COLOURS, DASHES, Axis, Chart, Line, draw
from sglight.report.curves import BOUNDARY, FLOW, STEP, Mean, by_epoch, by_number, learning, numbered, shown
from sglight.report.groups import Group
from sglight.report.measures import Comparison
from sglight.report.runs import Run

QUALITIES = {
    "cosine": "cosine with the true gradient",
    "sign_agreement": "part of equal signs",
    "relative_error": "relative error",
    "norm_ratio": "norm over the true norm",
}
DEPTHS = {
    "sigma_max": "largest singular value of a step",
    "sigma_min": "smallest singular value of a step",
    "spectral_radius": "spectral radius of a step",
    "state_norm": "norm of the state",
    "gradient_norm": "norm of the gradient",
}
FLOWS = {
    "growth": "growth of perturbations",
    "flow_sigma_max": "largest singular value of the flow",
    "reversal_error": "relative error of reversal",
}
CLOCKS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
LOG_FROM = 8.0  # training times that differ by a larger factor are drawn on a logarithmic axis
LOGARITHMIC = ("norm_ratio", "gradient_norm", "state_norm", "growth", "flow_sigma_max", "reversal_error")


@dataclass(frozen=True)
class Panel:
    """Charts that belong together; those in ``more`` are folded at first."""

    title: str
    note: str
    charts: Sequence[Chart]
    more: Sequence[Chart] = ()


def styles(groups: Sequence[Group]) -> dict[int, str]:
    """The colour and dash of each group, as CSS classes, by its number.

    The colour shows the strategy and the dash the other values, if there are several strategies and few other values.
    """
    strategies = list(dict.fromkeys(str(g.columns.get("strategy")) for g in groups))
    rest = {g.number: str([(k, v) for k, v in g.columns.items() if k != "strategy"]) for g in groups}
    others = list(dict.fromkeys(rest.values()))
    if 1 < len(strategies) <= COLOURS and len(others) <= DASHES:
        return {
            g.number: f"c{strategies.index(str(g.columns.get('strategy')))} d{others.index(rest[g.number])}"
            for g in groups
        }
    return {g.number: f"c{i % COLOURS} d{i // COLOURS % DASHES}" for i, g in enumerate(groups)}


def panels(comparison: Comparison) -> list[Panel]:
    """All panels for which the runs have data."""
    groups = comparison.task.groups
    made = [_learning(comparison), _quality(groups), _depth(groups)]
    return [panel for panel in made if panel.charts]


def _learning(comparison: Comparison) -> Panel:
    groups = comparison.task.groups
    batches, clock = Axis("batches"), _clock([t for g in groups for r in shown(g) for t in _last(r)])
    curves = (
        (
            "Validation accuracy",
            "val/acc",
            Axis("validation accuracy, %", factor=100, limits=_accuracies(groups)),
        ),
        ("Training loss", "train/loss", Axis("training loss", log=True)),
    )
    charts = [
        draw(f"{name} over {over}", x, y, _lines(groups, partial(learning, tag=tag), over_time))
        for name, tag, y in curves
        for over, x, over_time in (("batches", batches, False), ("wall time", clock, True))
    ]
    charts[2:2] = [_price(comparison), _price(comparison, ideal=True)]
    loss = Axis("validation loss", log=True)
    charts.append(
        draw("Validation loss over batches", batches, loss, _lines(groups, partial(learning, tag="val/loss")))
    )
    note = "Mean over the seeds with a band of one standard deviation, as far as all of them go."
    unfinished = [g.label for g in groups if not g.finished and any(r.curves for r in g.runs)]
    if unfinished:
        note += f" Not from finished runs: {', '.join(unfinished)}."
    if any(np.isnan(c.elapsed).all() for g in groups for r in shown(g) if (c := r.curves.get("val/acc"))):
        note += " Runs with logger=csv know no times and are missing over wall time."
    return Panel("Learning curves", note, _drawn(charts))


def _price(comparison: Comparison, ideal: bool = False) -> Chart | None:
    """Test accuracy over training time: as measured, or ``ideal``: with a worker for each stage and free messages.

    The ideal time is that of runs on one worker, divided by their ideal speed-up.
    """
    style, lines, gains = styles(comparison.task.groups), [], False
    for group, row in zip(comparison.task.groups, comparison.rows, strict=True):
        if {"time/fit_s", "test/acc"} <= row.keys():
            time, accuracy = row["time/fit_s"].mean, row["test/acc"]
            if ideal and (speedup := row.get("speedup/theoretical")) is not None:
                if any(run.metrics.get("run/workers", 1) > 1 for run in group.finished):
                    continue
                time, gains = time / speedup.mean, True
            point = np.array([time]), np.array([accuracy.mean]), np.array([accuracy.std or 0.0])
            lines.append(Line(group.number, style[group.number], group.label, *point))
    if len(lines) < 2 or (ideal and not gains):
        return None
    times = [line.xs[0] for line in lines]
    x = _clock(times, log=max(times) > LOG_FROM * min(times))
    title = "Test accuracy and what it took (best: top left)"
    if ideal:
        title = "Test accuracy and the ideal time with a worker for each stage (best: top left)"
    return draw(title, x, Axis("test accuracy, %", factor=100), lines)


def _clock(seconds: Sequence[float], log: bool = False) -> Axis:
    """An axis of time, with a unit that suits the longest."""
    longest = max((s for s in seconds if np.isfinite(s)), default=0.0)
    size, name = next((size, name) for size, name in CLOCKS if longest >= 3 * size or size == 1)
    return Axis(f"{name} of training", log, factor=1 / size)


def _last(run: Run) -> list[float]:
    """The time of the last validation of a run, if it has one."""
    return [float(curve.elapsed[-1])] if (curve := run.curves.get("val/acc")) is not None else []


def _quality(groups: Sequence[Group]) -> Panel:
    found = numbered(groups, BOUNDARY)
    profiles, curves = [], []
    for quality in _ordered(found, QUALITIES):
        title, y = _titled(quality, QUALITIES)
        lines = _lines(groups, partial(by_number, pattern=BOUNDARY, measure=quality))
        profiles.append(draw(f"{title}, at the end", Axis("boundary (0 is the first)", whole=True), y, lines))
        for i in found[quality]:
            lines = _lines(groups, partial(by_epoch, tag=f"boundary_{i}/{quality}"))
            curves.append(draw(f"{title}, boundary {i}", Axis("epoch", whole=True), y, lines))
    title = "Quality of the gradients at boundaries"
    note = "What a stage uses at its end, against the exact gradient there at present weights; means of an epoch."
    if all(len(numbers) == 1 for numbers in found.values()):
        return Panel(title, note, _drawn(curves))
    return Panel(title, note, _drawn(profiles), _drawn(curves))


def _depth(groups: Sequence[Group]) -> Panel:
    by_step = numbered(groups, STEP)
    tags = {tag for g in groups for run in shown(g) for tag in run.curves}
    flows = {found[1] for tag in tags if (found := FLOW.fullmatch(tag))}
    charts = []
    for measure in _ordered(by_step, DEPTHS):
        title, y = _titled(measure, DEPTHS)
        lines = _lines(groups, partial(by_number, pattern=STEP, measure=measure))
        charts.append(draw(f"{title}, at the end", Axis("step", whole=True), y, lines))
    for measure in _ordered(flows, FLOWS):
        title, y = _titled(measure, FLOWS)
        lines = _lines(groups, partial(learning, tag=f"stability/{measure}"))
        charts.append(draw(title, Axis("batches"), y, lines))
    note = "By time step of the network after the training, and of the whole flow over the training."
    return Panel("Stability by depth", note, _drawn(charts))


def _ordered(found: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """The known measures in their order, then the others."""
    return sorted(
        found, key=lambda measure: ([*known].index(measure) if measure in known else len(known), measure)
    )


def _titled(measure: str, known: Mapping[str, str]) -> tuple[str, Axis]:
    """The title of a measure, and the axis on which it is drawn."""
    name = known.get(measure, measure.replace("_", " "))
    return name[0].upper() + name[1:], Axis(name, log=measure in LOGARITHMIC)


def _lines(
    groups: Sequence[Group], curve: Callable[[Group], Mean | None], over_time: bool = False
) -> list[Line]:
    """A line for each group that has a ``curve``."""
    style, lines = styles(groups), []
    for group in groups:
        mean = curve(group)
        if mean is not None:
            xs, spread = mean.elapsed if over_time else mean.x, mean.std if mean.n > 1 else None
            lines.append(Line(group.number, style[group.number], group.label, xs, mean.mean, spread))
    return lines


def _accuracies(groups: Sequence[Group]) -> tuple[float, float] | None:
    """The ends of the axis of accuracy: around the best values of all groups; the first values may lie below it."""
    means = [mean.mean for g in groups if (mean := learning(g, "val/acc")) is not None]
    if not means:
        return None
    best, worst = max(float(m.max()) for m in means), min(float(m.max()) for m in means)
    least = min(float(m.min()) for m in means)
    room = max(best - worst, 0.03)
    low = max(least, worst - 2 * room)
    return low - 0.05 * (best - low) - 1e-3, min(best + 0.08 * (best - low) + 1e-3, 1.005)


def _drawn(charts: Sequence[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]
