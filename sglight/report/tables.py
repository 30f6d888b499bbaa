"""The comparison as a table: in the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from sglight.report import units
from sglight.report.groups import Group, show
from sglight.report.measures import TARGET, Comparison, Measure
from sglight.report.runs import NAMES, Run


def print_tables(comparisons: Sequence[Comparison], runs: Sequence[Run], console: Console) -> None:
    """A table for each data set, then the runs that did not finish and why."""
    for comparison in comparisons:
        table = _table(comparison)
        if not console.is_terminal:
            # What reads a pipe does not mind long lines, but cells broken over several.
            widest = Measurement.get(console, console.options.update(max_width=1000), table).maximum
            console.width = max(console.width, widest)
        console.print(table)
    for run in runs:
        if run.state not in ("finished", "running"):
            reason = f": {run.reason}" if run.reason else ""
            console.print(f"{run.state}: {run.folder}{reason}", soft_wrap=True, highlight=False, markup=False)


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A heading and a table for each data set."""
    parts = []
    for comparison in comparisons:
        rows = [_headings(comparison), *(_cells(comparison, i) for i in range(len(comparison.rows)))]
        rows = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
        first = len(comparison.measures)
        rows.insert(1, [*["---"] * (len(rows[0]) - first), *["---:"] * first])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        parts.append("\n".join([f"### {comparison.task.dataset}", "", *lines, ""]))
    return "\n".join(parts)


def to_csv(comparisons: Sequence[Comparison], runs: Sequence[Run]) -> str:
    """A line for each run, whatever its state: folder, names, differing keys, numbers of `metrics.json`."""
    keys = list(dict.fromkeys(key for c in comparisons for key in c.task.differences))
    names = [name for name in NAMES if any(name in run.config for run in runs)]
    metrics = sorted({key for run in runs for key in run.metrics})
    label = {id(run): group.label for c in comparisons for group in c.task.groups for run in group.runs}
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["folder", "state", "reason", "setting", "seed", *names, *keys, *metrics])
    for run in runs:
        values = [show(run.config[key]) if key in run.config else "" for key in ("seed", *names, *keys)]
        numbers = [f"{run.metrics[key]:.16g}" if key in run.metrics else "" for key in metrics]
        writer.writerow([str(run.folder), run.state, run.reason, label.get(id(run), ""), *values, *numbers])
    return text.getvalue()


def _table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=escape(comparison.task.dataset), title_justify="left")
    columns, measures = len(_keys(comparison)) + 1, len(comparison.measures)
    for heading, right in zip(_headings(comparison), [False] * columns + [True] * measures, strict=True):
        table.add_column(escape(heading), justify="right" if right else "left", vertical="bottom")
    for i in range(len(comparison.rows)):
        cells = [escape(cell) for cell in _cells(comparison, i)]
        for k, measure in enumerate(comparison.measures, start=columns):
            if _is_best(comparison, i, measure):
                cells[k] = f"[bold green]{cells[k]}[/]"
        table.add_row(*cells)
    return table


def _keys(comparison: Comparison) -> list[str]:
    """The columns that tell the groups apart."""
    return list(dict.fromkeys(key for group in comparison.task.groups for key in group.columns))


def _headings(comparison: Comparison) -> list[str]:
    keys = [key if key in NAMES else key.rpartition(".")[2] for key in _keys(comparison)]
    return [*keys, "runs", *(_heading(measure, comparison.target) for measure in comparison.measures)]


def _heading(measure: Measure, target: float | None) -> str:
    return (
        f"time to {units.percent(target)}" if measure.key == TARGET and target is not None else measure.title
    )


def _cells(comparison: Comparison, i: int) -> list[str]:
    group, row = comparison.task.groups[i], comparison.rows[i]
    values = [show(group.columns[k]) if k in group.columns else "–" for k in _keys(comparison)]
    return [*values, _states(group), *(measure.text(row.get(measure.key)) for measure in comparison.measures)]


def _states(group: Group) -> str:
    """How many runs are in each state: ``3``, or ``2 finished, 1 failed``; and what else they differ in."""
    counted = group.counted
    states = ", ".join(f"{n} {state}" for state, n in counted.items())
    mixed = f" (differ in {', '.join(group.mixed)})" if group.mixed else ""
    return (str(counted["finished"]) if list(counted) == ["finished"] else states) + mixed


def _is_best(comparison: Comparison, i: int, measure: Measure) -> bool:
    value = comparison.rows[i].get(measure.key)
    return value is not None and value.mean == comparison.best(measure)
