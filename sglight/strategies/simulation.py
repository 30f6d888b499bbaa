"""Who does what when: a schedule's own actions carried out on a clock instead of a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from sglight.strategies.schedule import Action, Schedule

# Over so many batches a pace is taken.
BATCHES = 64
# Tensors in a channel that nothing comes back through: nothing else keeps its sender from running ahead.
UNANSWERED = 4


class Span(NamedTuple):
    """What a worker did from ``start`` to ``end``: seconds of `perf_counter`, or the unit of simulated costs.

    The clock is common to the processes of one machine. ``phase`` is ``forward``, ``estimate``, ``backward``,
    ``arrive``, ``learn``, ``send``, or ``wait`` for what another worker sends.
    """

    phase: str
    stage: int
    batch: int
    start: float
    end: float


@dataclass
class StageTimes:
    """What the phases of a stage, and of the estimator at its end, cost for a batch: seconds, or any other unit."""

    forward: float = 0.0
    estimate: float = 0.0
    backward: float = 0.0
    learn: float = 0.0
    arrive: float = 0.0

    @property
    def total(self) -> float:
        """All phases in turn."""
        return self.forward + self.estimate + self.backward + self.learn + self.arrive


@dataclass(frozen=True)
class Messages:
    """What communication takes, in the unit of the costs; nothing by default.

    Attributes:
        states: by boundary, to send all states of a batch to another worker, or the gradients back.
        sums: by stage, to sum its gradients over the replicas; empty where there is one of each.
    """

    states: Sequence[float] = ()
    sums: Sequence[float] = ()


class _Line:
    """What carries messages one after the other."""

    def __init__(self) -> None:
        self._free = 0.0

    def carry(self, ready: float, time: float) -> float:
        """When something has arrived that is ready to go at a time."""
        self._free = max(self._free, ready) + time
        return self._free


class _Worker:
    """One worker's actions that are left, what it has done, and when it is free again."""

    def __init__(self, actions: Iterator[Action]) -> None:
        self.left = deque(actions)
        self.spans: list[Span] = []
        self.free = 0.0
        self.sums = _Line()

    def work(self, phase: str, cost: float, action: Action, batch: int) -> float:
        """Do something as soon as the worker is free; returns when it is done."""
        return self._until(self.free + cost, phase, action, batch)

    def wait(self, until: float, action: Action, batch: int) -> None:
        """Do nothing before that time."""
        self._until(until, "wait", action, batch)

    def _until(self, end: float, phase: str, action: Action, batch: int) -> float:
        if end > self.free:
            self.spans.append(Span(phase, action.stage, batch, self.free, end))
            self.free = end
        return end


def simulate(
    schedule: Schedule,
    groups: Sequence[range],
    costs: Sequence[StageTimes],
    batches: int,
    messages: Messages | None = None,
) -> list[list[Span]]:
    """The spans of each worker in the first ``batches`` of an epoch, with unbounded channels.

    A state leaves a stage when its forward pass ends, a gradient when its backward pass ends. What costs nothing has
    no span. Pieces of a batch cost equal parts of it, and carry its number; what is left to do behind the last batch
    is not shown.

    Args:
        groups: the stages of each worker, neighbours in order.
        costs: of each stage's phases for a batch, in any unit of time.
        messages: what they take, besides the workers' time; None for nothing.
    """
    messages = messages or Messages()
    last, pieces = len(costs) - 1, schedule.pieces
    assert list(chain(*groups)) == list(range(last + 1)), "groups must hold each stage once, in order"
    rounds = range(batches * pieces)
    order = _updates_last if messages.sums else list[Action]
    workers = [
        _Worker(chain.from_iterable(order(schedule.actions(n, own, last)) for n in rounds)) for own in groups
    ]
    states: dict[tuple[int, int], float] = {}  # by stage and piece: when it arrives below
    gradients: dict[tuple[int, int], float] = {}  # and when it arrives above
    sums: dict[tuple[int, int], float] = {}  # when the sum over the replicas is there
    between = {own.stop - 1 for own in groups if own.stop <= last} if messages.states else set[int]()
    down, up = ({i: _Line() for i in between} for _ in range(2))

    def arrival(lines: dict[int, _Line], boundary: int, ready: float) -> float:
        """When a piece of a batch has crossed a boundary."""
        if boundary not in lines:
            return ready
        return lines[boundary].carry(ready, messages.states[boundary] / pieces)

    def awaited(action: Action) -> float | None:
        """When what the action needs from a neighbouring stage is there; None if that is not known yet."""
        kind, i, piece = action
        if kind == "forward" and i > 0:
            return states.get((i - 1, piece))
        if i < last and kind in ("learn", schedule.receives):
            return gradients.get((i + 1, piece))
        return sums.get((i, piece), 0.0) if kind == "update" else 0.0

    def advance(worker: _Worker) -> bool:
        """Carry out what can be; whether that was anything."""
        moved = False
        while worker.left and (ready := awaited(worker.left[0])) is not None:
            action, moved = worker.left.popleft(), True
            kind, i, piece = action
            cost, batch = costs[i], piece // pieces
            if ready > worker.free:
                worker.wait(ready, action, batch)
            match kind:
                case "forward":
                    done = worker.work(kind, cost.forward / pieces, action, batch)
                    states[i, piece] = arrival(down, i, done)
                case "backward":
                    if not schedule.waits:
                        worker.work("estimate", cost.estimate / pieces, action, batch)
                    done = worker.work(kind, cost.backward / pieces, action, batch)
                    if schedule.sends(i, last) == kind:
                        gradients[i, piece] = arrival(up, i - 1, done)
                    if messages.sums and (piece + 1) % pieces == 0:
                        sums[i, piece] = worker.sums.carry(done, messages.sums[i])
                case "arrive":
                    done = worker.work(kind, cost.arrive / pieces, action, batch)
                    gradients[i, piece] = arrival(up, i - 1, done)
                case "learn":
                    worker.work(kind, cost.learn / pieces, action, batch)
        return moved

    while any(worker.left for worker in workers):
        assert any(advance(worker) for worker in workers), "the schedule's stages wait for each other"
    return [worker.spans for worker in workers]


def _updates_last(actions: Iterator[Action]) -> list[Action]:
    """As replicas do it: see `sglight.strategies.runtime`."""
    return sorted(actions, key=lambda action: action.kind == "update")


def end_of(workers: Sequence[Sequence[Span]]) -> float:
    """When the last of the workers is done."""
    return max(span.end for span in chain(*workers))


def period(
    schedule: Schedule,
    groups: Sequence[range],
    costs: Sequence[StageTimes],
    messages: Messages | None = None,
    batches: int = BATCHES,
) -> float:
    """Time a batch of `simulate`'s workers, once in full swing: in the second half of so many."""
    half = batches // 2
    # What a worker does in a batch depends on nothing later: the first half is a run of its own.
    end, middle = (end_of(simulate(schedule, groups, costs, count, messages)) for count in (batches, half))
    return (end - middle) / (batches - half)


def speedup(schedule: Schedule, groups: Sequence[range], costs: Sequence[StageTimes]) -> float:
    """How many times faster the groups' workers are than one worker that holds all stages and does the same."""
    return period(schedule, [range(len(costs))], costs) / period(schedule, groups, costs)


def in_flight(schedule: Schedule, stages: int) -> int:
    """How many tensors a channel must hold so that nobody waits for room in it where the schedule does not wait.

    The receiver keeps one until it asks for the next, and may stand still just before that; meanwhile the sender goes
    on until it needs what the receiver has not sent yet. The most of that, over all boundaries and both directions.
    """
    return max((_backlog(schedule, i, stages - 1) for i in range(stages - 1)), default=0)


def _backlog(schedule: Schedule, i: int, last: int) -> int:
    """`in_flight` for the boundary behind stage i."""
    above, below, answer = range(i + 1), range(i + 1, last + 1), schedule.sends(i + 1, last)
    still = 2 * schedule.latency(last) + 2 * schedule.pieces  # a round in full swing
    # The receiver of states stands still before round `still`: so many gradients have come back.
    back = {a.piece for n in range(still) for a in schedule.actions(n, below, last) if _is(a, answer, i + 1)}
    states = gradients = 0
    for n in range(2 * still + UNANSWERED + schedule.pieces):
        for action in schedule.actions(n, above, last):
            if _needs(schedule, action, i) and action.piece not in back:
                break
            states += _is(action, "forward", i)
        else:
            continue
        break
    else:
        return UNANSWERED
    # The receiver of gradients stands still before the first that it needs in round `still`.
    received, sent = 0, 0
    for n in range(still + 1):
        for action in schedule.actions(n, above, last):
            if n == still and _needs(schedule, action, i):
                break
            received += _needs(schedule, action, i)
            sent += _is(action, "forward", i)
    n = 0
    while True:
        actions = list(schedule.actions(n, below, last))
        if any(_is(a, "forward", i + 1) and a.piece >= sent for a in actions):
            break
        gradients += sum(_is(a, answer, i + 1) for a in actions)
        n += 1
    return max(states - still, gradients - received) + 1


def _is(action: Action, kind: str, stage: int) -> bool:
    return action.kind == kind and action.stage == stage


def _needs(schedule: Schedule, action: Action, i: int) -> bool:
    """Whether an action needs the gradient behind stage i."""
    return _is(action, schedule.receives, i)
