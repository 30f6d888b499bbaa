"""A simulated schedule as a text grid: which worker does what when."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from string import digits

from sglight.strategies.schedule import Schedule
from sglight.strategies.simulation import Span, StageTimes, end_of, period, simulate

WIDTH = 100
LETTERS = {"forward": "F", "estimate": "E", "backward": "B", "arrive": "A", "learn": "L"}
# Rows that do not fit are cut into so many parts at most.
PARTS = 3


def schedule_grid(
    schedule: Schedule,
    groups: Sequence[range],
    costs: Sequence[StageTimes],
    batches: int = 4,
    width: int = WIDTH,
    replicas: int = 1,
    unit: str = "",
) -> str:
    """The first ``batches`` of `simulate` as text at most ``width`` wide: a row a worker, all columns of equal time.

    Where the labels need more room the rows go on below. A phase too short for its label has its letter alone or a
    bar, and nothing at less than half a column. With 2 workers and lag 1::

        worker 0  F0 B0--- F1 B1--- L0 F2 B2--- L1
        worker 1  ...F0 B0--- F1 B1--- ...F2 B2---

    Args:
        replicas: R, each of which does the same with a part of each batch; one of them is shown.
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
    what = f"{_count(len(groups), 'worker')}{each}, {_count(len(costs), 'stage')}, {schedule.describe()}"
    return "\n".join(
        [
            f"{what}: the first {_count(batches, 'batch', 'batches')}, a column is {number(column)}{of}",
            _wrapped(names, rows, room),
            "[stage] F forward, E estimate, B backward, L learn [batch]; | one of these, short; . waits",
            *filter(None, [schedule.explain()]),
            f"a batch every {number(together)}{of}, with one worker every {number(alone)}: "
            f"{alone / together:.2f} times as fast",
        ]
    )


def number(value: float) -> str:
    """Three digits of a number, with ``k`` or ``M`` where it is large."""
    for size, letter in ((1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _wrapped(names: Sequence[str], rows: Sequence[str], room: int) -> str:
    """The rows with their names in front, cut into parts of at most ``room`` characters."""
    indent, parts = max(map(len, names)), list[str]()
    while any(rows):
        cut = _cut(rows, room)
        lines = [(name.ljust(indent) + row[:cut]).rstrip() for name, row in zip(names, rows, strict=True)]
        parts.append("\n".join(lines))
        rows = [row[cut:] for row in rows]
    return "\n\n".join(parts)


def _cut(rows: Sequence[str], room: int) -> int:
    """The last place to cut at that is in no label of any row; ``room`` if there is none near."""
    for place in range(room, room * 3 // 4, -1):
        if not any(row[place - 1 : place + 1].isalnum() and len(row) > place for row in rows):
            return place
    return room


def _row(spans: Sequence[Span], column: float, with_stage: bool) -> str:
    """One worker's spans in turn, with borders at the nearest column."""
    return "".join(_cell(span, _at(span.end, column) - _at(span.start, column), with_stage) for span in spans)


def _cell(span: Span, width: int, with_stage: bool) -> str:
    """A span as so many characters; a blank at its end, where there is room, parts it from the next."""
    if span.phase == "wait":
        return "." * width
    label = _label(span, with_stage)
    if width < len(label):
        return f"{label.strip(digits)} ".ljust(width) if width > 1 else "|" * width
    return label if width == len(label) else label.ljust(width - 1, "-") + " "


def _label(span: Span, with_stage: bool) -> str:
    return f"{span.stage if with_stage else ''}{LETTERS[span.phase]}{span.batch}"


def _column(workers: Sequence[Sequence[Span]], room: int, with_stage: bool) -> float:
    """Time of a column; the shortest pass has a whole number of them if it has any.

    All fits into ``room`` if the labels of the passes do, and else into no more than `PARTS` times that.
    """
    passes = [s for s in chain(*workers) if s.phase in ("forward", "backward")]
    end, shortest = end_of(workers), min(s.end - s.start for s in passes)
    needed = 1 + max(len(_label(s, with_stage)) for s in passes)
    in_one, in_all = (int(parts * room * shortest / end + 1e-9) for parts in (1, PARTS))
    columns = max(in_one, min(needed, in_all))
    return shortest / columns if columns else end / (PARTS * room)


def _at(time: float, column: float) -> int:
    """The nearest border of a column; halves go up, those that rounding has hit as well."""
    return int(time / column + 0.5 + 1e-6)


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
