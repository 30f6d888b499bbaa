"""Which worker does what when, for workers that hold one or more stages of given costs; as spans and as a text grid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from string import digits

from sglight.strategies.schedule import Span, StageTimes

WIDTH = 100
LETTERS = {"forward": "F", "estimate": "E", "backward": "B", "learn": "L"}
# Rows that do not fit are cut into so many parts at most.
PARTS = 3


class _Worker:
    """What one worker has done so far, and when it is free again."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.free = 0.0

    def work(self, phase: str, cost: float, stage: int, batch: int) -> float:
        """Do something as soon as the worker is free; returns when it is done."""
        return self._until(self.free + cost, phase, stage, batch)

    def wait(self, until: float, stage: int, batch: int) -> None:
        """Do nothing before that time."""
        self._until(until, "wait", stage, batch)

    def _until(self, end: float, phase: str, stage: int, batch: int) -> float:
        if end > self.free:
            self.spans.append(Span(phase, stage, batch, self.free, end))
            self.free = end
        return end


def simulate(
    groups: Sequence[range], costs: Sequence[StageTimes], lag: int | None, batches: int
) -> list[list[Span]]:
    """The spans of each worker in the first ``batches`` of an epoch, with free messages and unbounded queues.

    For each batch t a worker takes its stages in order: it waits for the state, goes forward (the state leaves then),
    estimates, goes backward (the gradient leaves then). Then it takes those with an estimator once more, from batch
    ``lag`` on: it waits for the gradient of batch t - lag, and learns. With one stage a worker that is the schedule
    whose pace is `schedule.period`. Waiting and learning carry the number of the batch that they are about; what
    costs nothing has no span. What is left to learn after an epoch's last batch is not shown.

    Args:
        groups: the stages of each worker, neighbours in order.
        costs: of each stage's phases, in any unit of time.
        lag: None for true gradients: see `simulate_exact`.
    """
    assert list(chain(*groups)) == list(range(len(costs))), "groups must hold each stage once, in order"
    if lag is None:
        return simulate_exact(groups, costs, batches)
    assert lag >= 0
    workers = [_Worker() for _ in groups]
    # By stage and batch: when the state left downwards, and when the gradient left upwards.
    states: dict[tuple[int, int], float] = {}
    gradients: dict[tuple[int, int], float] = {}
    for t in range(batches):
        for worker, group in zip(workers, groups, strict=True):
            for i in group:
                worker.wait(states.get((i - 1, t), 0.0), i, t)
                states[i, t] = worker.work("forward", costs[i].forward, i, t)
                worker.work("estimate", costs[i].estimate, i, t)
                gradients[i, t] = worker.work("backward", costs[i].backward, i, t)
        for worker, group in zip(workers, groups, strict=True):
            for i in group:
                if i + 1 < len(costs) and t >= lag:
                    worker.wait(gradients[i + 1, t - lag], i, t - lag)
                    worker.work("learn", costs[i].learn, i, t - lag)
    return [worker.spans for worker in workers]


def simulate_exact(groups: Sequence[range], costs: Sequence[StageTimes], batches: int) -> list[list[Span]]:
    """`simulate` for true gradients through all stages, from which estimators learn a batch later.

    For each batch a worker takes its stages in order: it waits for the state and goes forward. Then those with an
    estimator learn from the batch before, and then, last stage first, it waits for the gradient and goes backward.
    """
    workers = [_Worker() for _ in groups]
    for t in range(batches):
        sent = 0.0
        for worker, group in zip(workers, groups, strict=True):
            for i in group:
                worker.wait(sent, i, t)
                sent = worker.work("forward", costs[i].forward, i, t)
            for i in group:
                if i + 1 < len(costs) and t > 0:
                    worker.work("learn", costs[i].learn, i, t - 1)
        for worker, group in zip(reversed(workers), reversed(groups), strict=True):
            for i in reversed(group):
                worker.wait(sent, i, t)
                sent = worker.work("backward", costs[i].backward, i, t)
    return [worker.spans for worker in workers]


def group_period(
    groups: Sequence[range], costs: Sequence[StageTimes], lag: int | None, batches: int = 64
) -> float:
    """Time a batch of `simulate`'s workers, once in full swing: `schedule.period` for groups of stages."""
    half = batches // 2
    # What a worker does in a batch depends on nothing later: the first half is a run of its own.
    end, middle = (_end(simulate(groups, costs, lag, count)) for count in (batches, half))
    return (end - middle) / (batches - half)


def group_speedup(groups: Sequence[range], costs: Sequence[StageTimes], lag: int | None) -> float:
    """How many times faster the groups' workers are than one worker that holds all stages."""
    return group_period([range(len(costs))], costs, lag) / group_period(groups, costs, lag)


def schedule_grid(
    groups: Sequence[range],
    costs: Sequence[StageTimes],
    lag: int | None,
    batches: int = 4,
    width: int = WIDTH,
) -> str:
    """The first ``batches`` of `simulate` as text at most ``width`` wide: a row a worker, all columns of equal time.

    Where the labels need more room the rows go on below. A phase too short for its label has its letter alone or a
    bar, and nothing at less than half a column. With 2 workers and lag 1::

        worker 0  F0 B0--- F1 B1--- L0 F2 B2--- L1
        worker 1  ...F0 B0--- F1 B1--- ...F2 B2---
    """
    workers = simulate(groups, costs, lag, batches)
    with_stage = any(len(group) > 1 for group in groups)
    names = [f"worker {w}  " for w in range(len(workers))]
    room = width - len(names[-1])
    column = _column(workers, room, with_stage)
    rows = [_row(spans, column, with_stage) for spans in workers]
    alone, together = group_period([range(len(costs))], costs, lag), group_period(groups, costs, lag)
    gradients = "true gradients" if lag is None else f"lag {lag}"
    what = f"{_count(len(groups), 'worker')}, {_count(len(costs), 'stage')}, {gradients}"
    return "\n".join(
        [
            f"{what}: the first {_count(batches, 'batch', 'batches')}, a column is {column:.3g}",
            _wrapped(names, rows, room),
            "[stage] F forward, E estimate, B backward, L learn [batch]; | one of these, short; . waits",
            f"a batch every {together:.3g}, with one worker every {alone:.3g}: {alone / together:.2f} times as fast",
        ]
    )


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
    end, shortest = _end(workers), min(s.end - s.start for s in passes)
    needed = 1 + max(len(_label(s, with_stage)) for s in passes)
    in_one, in_all = (int(parts * room * shortest / end + 1e-9) for parts in (1, PARTS))
    columns = max(in_one, min(needed, in_all))
    return shortest / columns if columns else end / (PARTS * room)


def _at(time: float, column: float) -> int:
    """The nearest border of a column; halves go up, those that rounding has hit as well."""
    return int(time / column + 0.5 + 1e-6)


def _end(workers: Sequence[Sequence[Span]]) -> float:
    return max(span.end for span in chain(*workers))


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
