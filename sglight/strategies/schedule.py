"""Schedules: in which order stages act. The runtime carries out their actions; they are also simulated and drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from typing_extensions import override

from sglight.units import plural

Kind = Literal["forward", "backward", "arrive", "learn", "update"]


class Action(NamedTuple):
    """What a stage does with a piece of a batch (a microbatch).

    Attributes:
        kind: ``forward``, ``backward``; ``arrive``: a second backward pass, with the true gradient; ``learn``: the
            estimator after the stage learns from the true gradient; ``update``: the optimiser steps with the gradients
            of all pieces of the batch.
        stage: the number of the stage.
        piece: the number of the piece, counted since the pipeline was last empty.
    """

    kind: Kind
    stage: int
    piece: int


class Schedule(ABC):
    """The order in which stages act. The result of a training depends on it alone, never on timing.

    There is a round for each piece of a batch. In round n the stages of a worker carry out `actions`, on piece n and on
    earlier ones. The actions of a stage must not depend on which other stages its worker has.

    Attributes:
        pieces: m, into how many pieces a batch is split.
        receives: the kind of action that waits for the gradient of the next stage.
        flushes: whether all stages update with the gradients of the same batch before the next batch begins.

    >>> [(action.kind, action.piece) for action in Decoupled(lag=1).actions(n=5, own=range(0, 1), last=1)]
    [('forward', 5), ('backward', 5), ('update', 5), ('learn', 4)]
    """

    pieces: int = 1
    receives: ClassVar[Kind] = "backward"
    flushes: bool = False

    @abstractmethod
    def actions(self, n: int, own: range, last: int) -> Iterator[Action]:
        """The actions of a worker in round n, in order.

        Args:
            n: the round.
            own: the stages of the worker.
            last: the number of the last stage of the network.
        """

    def sends(self, i: int, last: int) -> Kind:
        """The kind of action after which stage i sends a gradient to the stage before it."""
        return "backward"

    @property
    def waits(self) -> bool:
        """Whether a backward pass waits for the gradient of the next stage."""
        return self.receives == "backward"

    def latency(self, last: int) -> int:
        """The number of rounds after which all actions on a piece are done."""
        return 0

    def rest(self, n: int, own: range, last: int) -> Iterator[list[Action]]:
        """The remaining actions, round by round, if there are no pieces from n on."""
        for k in range(n, n + self.latency(last)):
            yield [action for action in self.actions(k, own, last) if action.piece < n]

    def overlaps(self, i: int, last: int) -> bool:
        """Whether stage i goes forward on another piece before it is done with one."""
        return self.latency(last) > 0

    def staleness(self, i: int, piece: int, last: int) -> int:
        """The number of updates of stage i between its forward and its backward pass of a piece."""
        updates, forward = 0, False
        for n in range(piece, piece + self.latency(last) + self.pieces):
            for action in self.actions(n, range(i, i + 1), last):
                if action == ("backward", i, piece):
                    return updates
                forward = forward or action == ("forward", i, piece)
                updates += forward and action.kind == "update"
        raise AssertionError("a piece has no backward pass")

    def lateness(self, i: int, last: int) -> float:
        """The delay of the gradients of stage i, as a part of the longest one; 0 if none are late."""
        return 0.0

    @abstractmethod
    def describe(self) -> str:
        """A short description."""

    def explain(self) -> str:
        """A sentence below the printed schedule; may be empty."""
        return ""


@dataclass(frozen=True)
class Locked(Schedule):
    """Backpropagation: all stages go forward, then all backward with true gradients, then all update.

    Args:
        lessons: whether there are estimators that learn, one batch later, while their stage would wait.
        flushes: see `Schedule`.
    """

    lessons: bool = False
    flushes: bool = True

    @override
    def actions(self, n: int, own: range, last: int) -> Iterator[Action]:
        yield from (Action("forward", i, n) for i in own)
        if self.lessons and n > 0:
            yield from (Action("learn", i, n - 1) for i in own if i < last)
        yield from (Action("backward", i, n) for i in reversed(own))
        yield from (Action("update", i, n) for i in own)

    @override
    def latency(self, last: int) -> int:
        return int(self.lessons)

    @override
    def describe(self) -> str:
        return "true gradients"


@dataclass(frozen=True)
class Decoupled(Schedule):
    """Each stage goes forward, backward at once with a predicted gradient, and updates; its estimator learns later.

    Jaderberg et al. 2017, figure 2.

    Args:
        lag: the number of batches after which an estimator learns; with 0 it waits for the true gradient of the batch.
    """

    lag: int = 1
    receives: ClassVar[Kind] = "learn"

    def __post_init__(self) -> None:
        if self.lag < 0:
            raise ValueError(f"strategy.lag={self.lag} must be 0 (wait for the true gradient) or more")

    @override
    def actions(self, n: int, own: range, last: int) -> Iterator[Action]:
        yield from _at_once(n, own)
        if n >= self.lag:
            yield from (Action("learn", i, n - self.lag) for i in own if i < last)

    @override
    def latency(self, last: int) -> int:
        return self.lag

    @override
    def describe(self) -> str:
        return f"lag {self.lag}"

    @override
    def explain(self) -> str:
        if not self.lag:
            return (
                "lag 0: an estimator waits for the true gradient of its batch, and learns before the next one"
            )
        return f"lag {self.lag}: an estimator learns from batch t after batch t + {self.lag}, and waits for nobody"


@dataclass(frozen=True)
class Unanswered(Schedule):
    """Each stage goes forward, backward at once with a gradient of its own, and updates; no stage sends gradients."""

    receives: ClassVar[Kind] = "learn"

    @override
    def actions(self, n: int, own: range, last: int) -> Iterator[Action]:
        yield from _at_once(n, own)

    @override
    def describe(self) -> str:
        return "gradients of their own"

    @override
    def explain(self) -> str:
        return "a stage waits for states only: no gradients are sent"


@dataclass(frozen=True)
class Arriving(Schedule):
    """Each stage goes forward, backward at once with a gradient of its own, and backward again with the true one.

    In round n stage i goes backward on piece n, and again on piece n - d_i, d_i = M - 1 - i, so that no stage waits. An
    update uses the first gradients of one batch and the second ones of an earlier batch. True gradients pass through
    all stages, one batch later with each. Those that arrive after the last batch of an epoch are only used to learn.
    """

    receives: ClassVar[Kind] = "arrive"

    @override
    def sends(self, i: int, last: int) -> Kind:
        return "backward" if i == last else "arrive"

    @override
    def actions(self, n: int, own: range, last: int) -> Iterator[Action]:
        for i in own:
            arrived = n - (last - i)
            yield Action("forward", i, n)
            yield Action("backward", i, n)
            if i < last and arrived >= 0:
                yield Action("arrive", i, arrived)
            yield Action("update", i, n)
            if i < last and arrived >= 0:
                yield Action("learn", i, arrived)

    @override
    def latency(self, last: int) -> int:
        return last

    @override
    def staleness(self, i: int, piece: int, last: int) -> int:
        return last - i

    @override
    def describe(self) -> str:
        return "gradients of their own at once, true ones when they arrive"

    @override
    def explain(self) -> str:
        return "A: a second backward pass, with a true gradient, a batch later than that of the next stage"


@dataclass(frozen=True)
class Pipelined(Schedule):
    """A pipeline: in each round every stage goes forward on one piece and backward on an earlier one.

    In round n stage i goes backward on piece n - d_i, d_i = (1 + slack) (M - 1 - i), and it updates after the last
    piece of a batch. If the pipeline is not emptied, gradients are late: with m pieces in a batch, the weights have had
    ceil(max(0, d_i - j) / m) updates since the forward pass of piece j (Narayanan et al. 2019, PipeDream; Huo et al.
    2018, DDG).

    Args:
        pieces: m.
        slack: 0, or 1 for an additional round between two stages, so that they need not keep step exactly.
        flushes: whether the pipeline is emptied after each batch (1F1B, Narayanan et al. 2021).

    >>> pipeline = Pipelined(pieces=1)
    >>> [pipeline.staleness(i, piece=8, last=2) for i in range(3)]
    [2, 1, 0]
    """

    pieces: int = 1
    slack: int = 0
    flushes: bool = False

    def delay(self, i: int, last: int) -> int:
        """d_i: the number of rounds between the forward and the backward pass of a piece through stage i."""
        return (1 + self.slack) * (last - i)

    @override
    def lateness(self, i: int, last: int) -> float:
        return 0.0 if self.flushes or last == 0 else (last - i) / last

    @override
    def actions(self, n: int, own: range, last: int) -> Iterator[Action]:
        yield from (Action("forward", i, n) for i in own)
        first = n - n % self.pieces if self.flushes else 0  # earlier pieces are done
        yield from self._backward(n, own, last, first)
        if self.flushes and n == first + self.pieces - 1:
            for k in range(n + 1, n + 1 + self.delay(0, last)):
                yield from (a for a in self._backward(k, own, last, first) if a.piece <= n)
            yield from (Action("update", i, n) for i in own)

    def _backward(self, n: int, own: range, last: int, first: int) -> Iterator[Action]:
        # The first stage of a worker first, because its gradient is sent to another worker.
        for i in own:
            piece = n - self.delay(i, last)
            if piece >= first:
                yield Action("backward", i, piece)
                if not self.flushes and (piece + 1) % self.pieces == 0:
                    yield Action("update", i, piece)

    @override
    def latency(self, last: int) -> int:
        return 0 if self.flushes else self.delay(0, last)

    @override
    def overlaps(self, i: int, last: int) -> bool:
        return self.latency(last) > 0 or self.delay(i, last) > 0

    @override
    def describe(self) -> str:
        pieces = f"{plural(self.pieces, 'microbatch', 'microbatches')} a batch"
        if self.flushes:
            return f"true gradients, {pieces}, flushed"
        return f"delayed gradients, {pieces}, slack {self.slack}"

    @override
    def explain(self) -> str:
        if self.flushes:
            return ""
        rounds = "2 microbatches" if self.slack else "a microbatch"
        return f"a stage goes backward {rounds} later than the one after it, and waits for nobody"


def _at_once(n: int, own: range) -> Iterator[Action]:
    """For each stage in turn: forward, backward and update, without waiting for gradients."""
    for i in own:
        yield Action("forward", i, n)
        yield Action("backward", i, n)
        yield Action("update", i, n)


def stage_names(stages: Sequence[int], part: str = "stage") -> str:
    """The names of consecutive stages; ``part`` is what a stage is called.

    >>> stage_names([0]), stage_names([0, 1, 2])
    ('stage 0', 'stages 0-2')
    """
    return f"{part} {stages[0]}" if len(stages) == 1 else f"{part}s {stages[0]}-{stages[-1]}"
