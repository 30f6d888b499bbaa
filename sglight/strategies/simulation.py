"""Simulates a schedule: its actions advance a clock instead of computing a network."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from sglight.strategies.schedule import Action, Schedule

# The number of batches from which the time for a batch is computed.
BATCHES = 64
# The most tensors in a channel whose receiver sends nothing back; only this limit keeps its sender from running ahead.
UNANSWERED = 4


class Span(NamedTuple):
    """One phase of the work of a worker, from ``start`` to ``end``.

    Times are seconds of `perf_counter`, which is the same clock for all processes of one machine, or the unit of
    simulated costs. ``phase`` is ``forward``, ``estimate``, ``backward``, ``arrive``, ``learn``, ``send``, or ``wait``
    if the worker waits for another one.
    """

    phase: str
    stage: int
    batch: int
    start: float
    end: float


@dataclass
class StageTimes:
    """The cost of each phase of a stage and of the estimator at its end, for one batch, in seconds or another unit."""

    forward: float = 0.0
    estimate: float = 0.0
    backward: float = 0.0
    learn: float = 0.0
    arrive: float = 0.0

    @property
    def total(self) -> float:
        """The sum over all phases."""
        return self.forward + self.estimate + self.backward + self.learn + self.arrive


@dataclass(frozen=True)
class Messages:
    """The time that communication takes, in the unit of the costs; none by default.

    Attributes:
        states: by boundary, the time to send all states of a batch to another worker, or the gradients back.
        sums: by stage, the time to sum its gradients over the replicas; empty if there is only one of each stage.
    """

    states: Sequence[float] = ()
    sums: Sequence[float] = ()


class _Line:
    """A connection that carries one message at a time."""

    def __init__(self) -> None:
        self._free = 0.0

    def carry(self, ready: float, time: float) -> float:
        """The time of arrival of a message that is sent at ``ready`` or later, and takes ``time``."""
        self._free = max(self._free, ready) + time
        return self._free


class _Worker:
    """A simulated worker: the actions that it has yet to do, the spans of those that it has done, and its clock."""

    def __init__(self, actions: Iterator[Action]) -> None:
        self.left = deque(actions)
        self.spans: list[Span] = []
        self.free = 0.0
        self.sums = _Line()

    def work(self, phase: str, cost: float, action: Action, batch: int) -> float:
        """Do something as soon as the worker is free; returns the time when it is done."""
        return self._until(self.free + cost, phase, action, batch)

    def wait(self, until: float, action: Action, batch: int) -> None:
        """Wait until a time."""
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
    """The spans of each worker in the first ``batches`` of an epoch.

    A state leaves a stage when its forward pass ends, a gradient when its backward pass ends; a sender never waits for
    room in a channel. Each piece of a batch costs the same part of it. Phases without cost have no span, and the work
    that is left after the last batch is not simulated.

    Args:
        schedule: the order of the actions.
        groups: the stages of each worker, in order.
        costs: of the phases of each stage for a batch, in any unit of time.
        batches: how many to simulate.
        messages: the time of communication; None for none.

    >>> from sglight.strategies.schedule import Locked
    >>> (worker,) = simulate(Locked(), [range(1)], [StageTimes(forward=1, backward=2)], batches=1)
    >>> [(span.phase, span.start, span.end) for span in worker]
    [('forward', 0.0, 1.0), ('backward', 1.0, 3.0)]
    """
    messages = messages or Messages()
    last, pieces = len(costs) - 1, schedule.pieces
    assert list(chain(*groups)) == list(range(last + 1)), "groups must hold each stage once, in order"
    rounds = range(batches * pieces)
    order = _updates_last if messages.sums else list[Action]
    workers = [
        _Worker(chain.from_iterable(order(schedule.actions(n, own, last)) for n in rounds)) for own in groups
    ]
    # By stage and piece: the times when states arrive at the next stage, gradients at the stage before, and sums over
    # replicas at all of these.
    states: dict[tuple[int, int], float] = {}
    gradients: dict[tuple[int, int], float] = {}
    sums: dict[tuple[int, int], float] = {}
    between = {own.stop - 1 for own in groups if own.stop <= last} if messages.states else set[int]()
    down, up = ({i: _Line() for i in between} for _ in range(2))

    def arrival(lines: dict[int, _Line], boundary: int, ready: float) -> float:
        """The time when the state or gradient of a piece has crossed a boundary."""
        if boundary not in lines:
            return ready
        return lines[boundary].carry(ready, messages.states[boundary] / pieces)

    def awaited(action: Action) -> float | None:
        """The time when the input of an action arrives from another worker or stage; None if not known yet."""
        kind, i, piece = action
        if kind == "forward" and i > 0:
            return states.get((i - 1, piece))
        if i < last and kind in ("learn", schedule.receives):
            return gradients.get((i + 1, piece))
        return sums.get((i, piece), 0.0) if kind == "update" else 0.0

    def advance(worker: _Worker) -> bool:
        """Carry out the actions whose input is known; whether there was any."""
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
    """The actions of a round with updates at its end, as replicas do them: see `sglight.strategies.runtime`."""
    return sorted(actions, key=lambda action: action.kind == "update")


def end_of(workers: Sequence[Sequence[Span]]) -> float:
    """The time when the last worker is done."""
    return max(span.end for span in chain(*workers))


def period(
    schedule: Schedule,
    groups: Sequence[range],
    costs: Sequence[StageTimes],
    messages: Messages | None = None,
    batches: int = BATCHES,
) -> float:
    """The time for one batch once the pipeline is full: the mean over the second half of ``batches`` batches."""
    half = batches // 2
    # The simulation of half the batches is the first half of the simulation of all of them.
    end, middle = (end_of(simulate(schedule, groups, costs, count, messages)) for count in (batches, half))
    return (end - middle) / (batches - half)


def speedup(schedule: Schedule, groups: Sequence[range], costs: Sequence[StageTimes]) -> float:
    """How many times faster the workers with these groups of stages are than one worker with all stages."""
    return period(schedule, [range(len(costs))], costs) / period(schedule, groups, costs)


def in_flight(schedule: Schedule, stages: int) -> int:
    """The number of tensors that a channel must hold so that its sender never waits for room in it.

    The receiver keeps one tensor until it asks for the next, and may stop just before that. Meanwhile the sender goes
    on until it needs something that the receiver has not sent yet. The number is the largest that this gives, over
    all boundaries and both directions.
    """
    return max((_backlog(schedule, i, stages - 1) for i in range(stages - 1)), default=0)


def _backlog(schedule: Schedule, i: int, last: int) -> int:
    """`in_flight` for the boundary after stage i."""
    above, below, answer = range(i + 1), range(i + 1, last + 1), schedule.sends(i + 1, last)
    still = 2 * schedule.latency(last) + 2 * schedule.pieces  # a round in which the pipeline is full
    # If the receiver of states stops before round `still`, it has sent these gradients.
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
    # The receiver of gradients stops before the first that it needs in round `still`.
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
    """Whether an action needs the gradient at the end of stage i."""
    return _is(action, schedule.receives, i)
