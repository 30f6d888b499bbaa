"""Renders the comparison as one HTML page that needs no network."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from math import hypot, sqrt
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sglight import units
from sglight.report.groups import Group, identity, show
from sglight.report.literature import Beside, beside
from sglight.report.measures import ALONE, BACKPROP, MEASURES, TARGET, Comparison, Measure, Row, statistic
from sglight.report.panels import Panel, panels, styles
from sglight.report.reading import cleaned
from sglight.report.runs import Run
from sglight.report.tables import reasons
from sglight.report.verdict import verdict

TEMPLATE = "page.html.jinja"
# The measures whose best group the tiles at the top show, with the title of each tile.
HIGHLIGHTS = {
    "test/acc": "Most accurate",
    TARGET: "First at the target",
    "throughput/samples_per_s": "Most samples a second",
}

GOING_WELL = ("finished", "running", "repeated")  # states of runs that are no problem
MOST_SHOWN = 8  # so many curves are shown at first, and so many settings without folding
MOST_LISTED = 20  # longer lists of runs are folded
NEAR = 2  # a tile names so many groups that are about as good


@dataclass(frozen=True)
class Tile:
    """The group that is the best in a measure."""

    title: str
    group: Group
    value: str
    note: str


@dataclass(frozen=True)
class Section:
    """What the page shows of one task."""

    comparison: Comparison
    verdict: str
    shown: frozenset[int]
    styles: dict[int, str]
    drawn: Sequence[Group]
    tiles: Sequence[Tile]
    literature: Sequence[Beside]
    panels: Sequence[Panel]
    differences: Sequence[tuple[str, Sequence[str]]]
    everything: Sequence[tuple[str, Sequence[str]]]


def render(runs: Sequence[Run], comparisons: Sequence[Comparison], folder: Path) -> str:
    """The HTML of the page, to be written into ``folder``: its links to runs are relative to that."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "link": lambda run: quote(os.fsencode(os.path.relpath(run.folder, folder.resolve()))) + "/",
        "name": lambda run: cleaned(f"{run.folder.parent.name}/{run.folder.name}"),
        "percent": units.percent,
        "seconds": units.seconds,
        "show": show,
        "when": lambda run: datetime.fromtimestamp(run.changed, UTC).astimezone().strftime("%Y-%m-%d %H:%M"),
    }
    return environment.get_template(TEMPLATE).render(
        runs=runs,
        states=sorted(Counter(run.state for run in runs).items(), key=lambda pair: pair[0] not in GOING_WELL),
        well=GOING_WELL,
        most_shown=MOST_SHOWN,
        most_listed=MOST_LISTED,
        machines=[
            (*key, n) for key, n in Counter((r.machine, r.versions) for r in runs if r.metrics).most_common()
        ],
        reasons=reasons(runs),
        sections=[_section(comparison) for comparison in comparisons],
        measures=MEASURES,
        now=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        TARGET=TARGET,
        relative=(ALONE, BACKPROP),
    )


def _section(comparison: Comparison) -> Section:
    groups, charts = comparison.task.groups, panels(comparison)
    drawn = {mark.group for panel in charts for c in (*panel.charts, *panel.more) for mark in c.marks}
    return Section(
        comparison,
        verdict(comparison),
        _shown(comparison),
        styles(groups),
        [group for group in groups if group.number in drawn],
        _tiles(comparison),
        beside(comparison),
        charts,
        [(key, [_values(group, key) for group in groups]) for key in comparison.task.differences],
        _everything(groups),
    )


def _shown(comparison: Comparison) -> frozenset[int]:
    """The numbers of the groups whose curves are shown at first: the most accurate and the best of backpropagation."""
    pairs = list(zip(comparison.task.groups, comparison.rows, strict=True))

    def accuracy(pair: tuple[Group, Row]) -> float:
        found = pair[1].get("test/acc") or pair[1].get("val/acc")
        return found.mean if found else 0.0

    ordered = [group for group, _ in sorted(pairs, key=accuracy, reverse=True)]
    yardsticks = [group.number for group in ordered if group.columns.get("strategy") == "backprop"]
    return frozenset([*dict.fromkeys([*yardsticks[:1], *(group.number for group in ordered)])][:MOST_SHOWN])


def _tiles(comparison: Comparison) -> list[Tile]:
    measures = {measure.key: measure for measure in comparison.measures}
    return [
        _tile(comparison, measures[key], title)
        for key, title in HIGHLIGHTS.items()
        if key in measures and comparison.best(measures[key]) is not None
    ]


def _tile(comparison: Comparison, measure: Measure, title: str) -> Tile:
    """The best group, and groups that differ from it by less than the root mean square of the two deviations."""
    pairs = [
        (group, row[measure.key])
        for group, row in zip(comparison.task.groups, comparison.rows, strict=True)
        if measure.key in row
    ]
    best = comparison.best(measure)
    group, winner = next(pair for pair in pairs if pair[1].mean == best)
    near = [
        other.label
        for other, value in pairs
        if other is not group
        and abs(value.mean - winner.mean) <= hypot(value.std or 0, winner.std or 0) / sqrt(2)
    ]
    more = f" and {len(near) - NEAR} more" if len(near) > NEAR else ""
    note = f"within a standard deviation: {', '.join(near[:NEAR])}{more}" if near else ""
    return Tile(title, group, measure.text(winner), note)


def _values(group: Group, key: str) -> str:
    """The values of a key in the runs of a group."""
    found = [identity(run.config) for run in group.runs]
    values = dict.fromkeys(show(config[key]) for config in found if key in config)
    return ", ".join(values) or "–"


def _everything(groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """Every number in `metrics.json`: for each its mean ± deviation in each group."""
    keys = sorted({key for group in groups for run in group.finished for key in run.metrics} - {"run/seed"})
    rows = []
    for key in keys:
        cells = []
        for group in groups:
            values = [run.metrics[key] for run in group.finished if key in run.metrics]
            stat = statistic(values, len(values)) if values else None
            cells.append("–" if stat is None else units.plain(stat.mean, stat.std or None))
        rows.append((key, cells))
    return rows
