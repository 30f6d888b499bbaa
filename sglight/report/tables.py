"""Prints the comparison as a table in the terminal, and writes it as Markdown or CSV."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from io import StringIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from sglight import units
from sglight.report.groups import Group, show
from sglight.report.measures import TARGET, Comparison, Measure
from sglight.report.reading import cleaned
from sglight.report.runs import NAMES, Run
from sglight.report.verdict import verdict

RUNS = "runs"
GOING = ("finished", "running")
MOST_NAMED = 8  # so many runs that did not finish are listed
FORMULA = ("=", "+", "-", "@")  # spreadsheets take a text that begins so for a formula
_NUMBER = re.compile(r"[+-]?[\d.]+(e[+-]?\d+)?")


def print_tables(
    comparisons: Sequence[Comparison], runs: Sequence[Run], console: Console, keys: Sequence[str] = ()
) -> None:
    """Prints the verdict and the table of each comparison, then the runs that are not compared.

    Args:
        comparisons: to print.
        runs: all runs.
        console: on which to print; if it is narrow a table is printed in parts.
        keys: of the measures to show; if empty, all.
    """
    for comparison in comparisons:
        console.print(verdict(comparison), highlight=False, markup=False)
        for table in _fitting(comparison, console, keys):
            console.width = max(console.width, _width(table, console))
            console.print(table)
        if comparison.note:
            console.print(comparison.note, highlight=False, markup=False)
    if aside := reasons(runs):
        console.print(f"aside: {aside}", highlight=False, markup=False)
    unfinished = [run for run in runs if run.state not in GOING]
    for run in unfinished[:MOST_NAMED]:
        reason = f": {run.reason}" if run.reason else ""
        text = f"{run.state}: {cleaned(str(run.folder))}{reason}"
        console.print(text, soft_wrap=True, highlight=False, markup=False)
    if len(unfinished) > MOST_NAMED:
        console.print(f"and {len(unfinished) - MOST_NAMED} more; --html and --csv have all of them")


def reasons(runs: Sequence[Run]) -> str:
    """Why runs are not compared, and how many: ``3 failed, 1 test``."""
    counted = Counter(run.aside for run in runs if run.aside)
    return ", ".join(f"{n} {reason}" for reason, n in counted.most_common())


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A heading, the verdict and a table for each comparison, as Markdown."""
    parts = []
    for comparison in comparisons:
        keys = [*_titles(comparison), RUNS]
        rows = [[*keys, *(_heading(measure, comparison.target) for measure in comparison.measures)]]
        for i, row in enumerate(comparison.rows):
            numbers = [measure.text(row.get(measure.key)) for measure in comparison.measures]
            rows.append([*_identity(comparison, i), *numbers])
        rows = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in rows]
        rows.insert(1, [*["---"] * len(keys), *["---:"] * len(comparison.measures)])
        lines = [f"| {' | '.join(row)} |" for row in rows]
        parts.append("\n".join([f"### {comparison.task.dataset}", "", verdict(comparison), "", *lines, ""]))
    return "\n".join(parts)


def to_csv(comparisons: Sequence[Comparison], runs: Sequence[Run]) -> str:
    """A row for each run, whatever its state: folder, choices, keys in which runs differ, numbers in `metrics.json`."""
    keys = list(dict.fromkeys(key for c in comparisons for key in c.task.differences))
    names = [name for name in NAMES if any(name in run.config for run in runs)]
    metrics = sorted({key for run in runs for key in run.metrics})
    label = {id(run): group.label for c in comparisons for group in c.task.groups for run in group.runs}
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["folder", "state", "reason", "setting", "seed", *names, *map(_cell, [*keys, *metrics])])
    for run in runs:
        values = [show(run.config[key]) if key in run.config else "" for key in ("seed", *names, *keys)]
        numbers = [f"{run.metrics[key]:.16g}" if key in run.metrics else "" for key in metrics]
        texts = [str(run.folder), run.state, run.reason, label.get(id(run), ""), *values]
        writer.writerow([*map(_cell, texts), *numbers])
    return text.getvalue()


def _cell(text: str) -> str:
    """A text quoted so that no spreadsheet takes it for a formula; numbers stay."""
    text = cleaned(text)
    return f"'{text}" if text.startswith(FORMULA) and not _NUMBER.fullmatch(text) else text


def _fitting(comparison: Comparison, console: Console, keys: Sequence[str]) -> list[Table]:
    """The table of a comparison; if the terminal is too narrow, several tables with fewer measures.

    These have the deviations below the means. Output to a file or pipe is one table.
    """
    measures = [measure for measure in comparison.measures if not keys or measure.key in keys]
    whole = _table(comparison, measures)
    if not console.is_terminal or _width(whole, console) <= console.width:
        return [whole]
    blocks: list[list[Measure]] = [[]]
    for measure in measures:
        wider = [*blocks[-1], measure]
        if len(wider) > 1 and _width(_table(comparison, wider, stacked=True), console) > console.width:
            blocks.append([measure])
        else:
            blocks[-1] = wider
    return [_table(comparison, block, stacked=True) for block in blocks]


def _width(table: Table, console: Console) -> int:
    """The width of a table without wrapping."""
    return Measurement.get(console, console.options.update(max_width=1000), table).maximum


def _table(comparison: Comparison, measures: Sequence[Measure], stacked: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=escape(comparison.task.dataset), title_justify="left")
    for title in (*_titles(comparison), RUNS):
        table.add_column(escape(title))
    for measure in measures:
        heading = _heading(measure, comparison.target)
        if stacked:
            heading = heading.replace(" %", "\N{NO-BREAK SPACE}%").replace(" ", "\n")
        table.add_column(escape(heading), justify="right")
    for i, row in enumerate(comparison.rows):
        cells = [escape(cell) for cell in _identity(comparison, i, "\n" if stacked else ", ")]
        for measure in measures:
            mean, spread = measure.halves(row.get(measure.key))
            text = f"{mean}\n[dim]{spread}[/]" if stacked else measure.text(row.get(measure.key))
            cells.append(f"[bold green]{text}[/]" if comparison.is_best(i, measure) else text)
        table.add_row(*cells)
    return table


def _keys(comparison: Comparison) -> list[str]:
    """The keys in which groups differ."""
    return list(dict.fromkeys(key for group in comparison.task.groups for key in group.columns))


def _titles(comparison: Comparison) -> list[str]:
    """Short names of `_keys`."""
    return [comparison.task.groups[0].titles[key] for key in _keys(comparison)]


def _heading(measure: Measure, target: float | None) -> str:
    if measure.key == TARGET and target is not None:
        return f"time to {units.percent(target)}"
    return measure.title


def _identity(comparison: Comparison, i: int, between: str = ", ") -> list[str]:
    """The cells of a group for `_keys`, and its number of runs."""
    group = comparison.task.groups[i]
    values = [show(group.columns[k]) if k in group.columns else "–" for k in _keys(comparison)]
    return [*values, _states(group, between)]


def _states(group: Group, between: str) -> str:
    """The number of runs, by state unless all are finished; and the keys in which they differ, if there are any."""
    counted = group.counted
    if list(counted) == ["finished"]:
        states = [str(counted["finished"])]
    else:
        states = [f"{n} {state}" for state, n in counted.items()]
    if group.mixed:
        states.append(f"differ in {' and '.join(group.mixed)}")
    return between.join(states)
