"""Prints a simulated schedule as a text grid: what each worker does when."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from string import digits

from sglight import units
from sglight.strategies.schedule import Schedule
from sglight.strategies.simulation import Span, StageTimes, end_of, period, simulate

WIDTH = 100
LETTERS = {"forward": "F", "estimate": "E", "backward": "B", "arrive": "A", "learn": "L"}
PARTS = 3  # rows that are too long are split into at most so many parts


def schedule_grid(
    schedule: Schedule,
    groups: Sequence[range],
    costs: Sequence[StageTimes],
    batches: int = 4,
    width: int = WIDTH,
    replicas: int = 1,
    unit: str = "",
) -> str:
    """The first ``batches`` of `simulate` as text: a row for each worker, with columns of equal time.

    Rows longer than ``width`` continue below. A phase that is too short for its label is shown as a letter or a bar,
    and one shorter than half a column is not shown. With 2 workers and lag 1::

        worker 0  F0 B0--- F1 B1--- L0 F2 B2--- L1
        worker 1  ...F0 B0--- F1 B1--- ...F2 B2---

    Args:
        schedule: the order of the actions.
        groups: the stages of each worker, in order.
        costs: of the phases of each stage for a batch.
        batches: how many to show.
        width: of the text, in characters.
        replicas: the number of workers with the same stages, each with a part of each batch; one of them is shown.
        unit: of the costs.
    """
    shared = [StageTimes(*(cost / replicas for cost in vars(stage).values())) for stage in costs]
    workers = simulate(schedule, groups, shared, batches)
    with_stage = any(len(group) > 1 for group in groups)
    names = [f"worker {w}  " for w in range(len(workers))]
    room = width - len(names[-1])
    column = _column(workers, room, with_stage)
    rows = [_row(spans, column, with_stage) for spans in workers]
    alone, together = period(schedule, [range(len(costs))], costs), period(schedule, groups, shared)
    of = f" {unit}" if unit else ""
    each = f" in each of {replicas} replicas" if replicas > 1 else ""
    workers_and_stages = f"{units.plural(len(groups), 'worker')}{each}, {units.plural(len(costs), 'stage')}"
    what = f"{workers_and_stages}, {schedule.describe()}"
    return "\n".join(
        [
            f"{what}: the first {units.plural(batches, 'batch', 'batches')}, a column is {units.short(column)}{of}",
            _wrapped(names, rows, room),
            "[stage] F forward, E estimate, B backward, L learn [batch]; | one of these, short; . waits",
            *filter(None, [schedule.explain()]),
            f"a batch every {units.short(together)}{of}, with one worker every {units.short(alone)}: "
            f"{alone / together:.2f} times as fast",
        ]
    )


def _wrapped(names: Sequence[str], rows: Sequence[str], room: int) -> str:
    """The rows with their names in front, split into parts of at most ``room`` characters."""
    indent, parts = max(map(len, names)), list[str]()
    while any(rows):
        cut = _cut(rows, room)
        lines = [(name.ljust(indent) + row[:cut]).rstrip() for name, row in zip(names, rows, strict=True)]
        parts.append("\n".join(lines))
        rows = [row[cut:] for row in rows]
    return "\n\n".join(parts)


def _cut(rows: Sequence[str], room: int) -> int:
    """The last place at which no label of any row would be split; ``room`` if there is none near."""
    for place in range(room, room * 3 // 4, -1):
        if not any(row[place - 1 : place + 1].isalnum() and len(row) > place for row in rows):
            return place
    return room


def _row(spans: Sequence[Span], column: float, with_stage: bool) -> str:
    """The spans of one worker, with borders rounded to columns."""
    return "".join(_cell(span, _at(span.end, column) - _at(span.start, column), with_stage) for span in spans)


def _cell(span: Span, width: int, with_stage: bool) -> str:
    """A span as ``width`` characters, with a blank at the end if there is room."""
    if span.phase == "wait":
        return "." * width
    label = _label(span, with_stage)
    if width < len(label):
        return f"{label.strip(digits)} ".ljust(width) if width > 1 else "|" * width
    return label if width == len(label) else label.ljust(width - 1, "-") + " "


def _label(span: Span, with_stage: bool) -> str:
    return f"{span.stage if with_stage else ''}{LETTERS[span.phase]}{span.batch}"


def _column(workers: Sequence[Sequence[Span]], room: int, with_stage: bool) -> float:
    """The time of a column, chosen so that the shortest pass has a whole number of columns.

    All columns fit into ``room`` if the labels of the passes do, otherwise into at most `PARTS` times that.
    """
    passes = [s for s in chain(*workers) if s.phase in ("forward", "backward")]
    end, shortest = end_of(workers), min(s.end - s.start for s in passes)
    needed = 1 + max(len(_label(s, with_stage)) for s in passes)
    in_one, in_all = (int(parts * room * shortest / end + 1e-9) for parts in (1, PARTS))
    columns = max(in_one, min(needed, in_all))
    return shortest / columns if columns else end / (PARTS * room)


def _at(time: float, column: float) -> int:
    """The nearest border of a column; halves are rounded up, also if they are a little smaller by rounding errors."""
    return int(time / column + 0.5 + 1e-6)
