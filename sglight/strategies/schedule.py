"""In which order stages act. A schedule's actions are carried out by the runtime, simulated, printed and drawn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from typing_extensions import override

Kind = Literal["forward", "backward", "arrive", "learn", "update"]


class Action(NamedTuple):
    """What a stage does with a piece of a batch; pieces are counted from when the pipeline was last empty.

    ``forward`` and ``backward`` passes; ``arrive``: a second backward pass, with the true gradient; ``learn``: a lesson
    for the estimator behind the stage, from the true gradient; ``update``: the optimiser's step with the gradients of
    all pieces of that batch.
    """

    kind: Kind
    stage: int
    piece: int


class Schedule(ABC):
    """In which order the stages act; it alone decides what is learnt, never the clock.

    There is a round for each piece of a batch. In round n the stages of a worker carry out `actions`, whose passes are
    of piece n and of earlier ones. What a stage does must not depend on which other stages are on its worker.

    Attributes:
        pieces: m, into how many pieces a batch is cut.
        receives: what it is that waits for the gradient of the stage after it.
        flushes: whether all stages update with the gradients of one and the same batch, before the next one begins.
    """

    pieces: int = 1
    receives: ClassVar[Kind] = "backward"
    flushes: bool = False

    @abstractmethod
    def actions(self, n: int, own: range, last: int) -> Iterator[Action]:
        """What the stages ``own`` of a worker do in round n, in order; ``last`` is the number of the last stage."""

    def sends(self, i: int, last: int) -> Kind:
        """What it is behind which stage i sends a gradient to the one before it."""
        return "backward"

    @property
    def waits(self) -> bool:
        """Whether a backward pass waits for the gradient of the stage after it."""
        return self.receives == "backward"

    def latency(self, last: int) -> int:
        """After how many further rounds nothing of a piece is left to do."""
        return 0

    def rest(self, n: int, own: range, last: int) -> Iterator[list[Action]]:
        """What is left to do, round by round, if no piece comes in round n or later."""
        for k in range(n, n + self.latency(last)):
            yield [action for action in self.actions(k, own, last) if action.piece < n]

    def overlaps(self, i: int, last: int) -> bool:
        """Whether stage i goes forward on a further piece before it is done with one."""
        return self.latency(last) > 0

    def staleness(self, i: int, piece: int, last: int) -> int:
        """How many updates stage i has had between its forward and its backward pass of a piece."""
        updates, forward = 0, False
        for n in range(piece, piece + self.latency(last) + self.pieces):
            for action in self.actions(n, range(i, i + 1), last):
                if action == ("backward", i, piece):
                    return updates
                forward = forward or action == ("forward", i, piece)
                updates += forward and action.kind == "update"
        raise AssertionError("a piece has no backward pass")

    def lateness(self, i: int, last: int) -> float:
        """How late the gradients of stage i are, as a part of the latest; 0 if none are."""
        return 0.0

    @abstractmethod
    def describe(self) -> str:
        """In a few words."""

    def explain(self) -> str:
        """A sentence beneath its picture; empty if the picture says all."""
        return ""


@dataclass(frozen=True)
class Locked(Schedule):
    """All stages forward, then all backward with true gradients, then all updates: backpropagation.

    Args:
        lessons: whether estimators learn, a batch later: so lessons fill the time in which a stage waits.
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
    """Each stage forward, backward at once with a predicted gradient, and updated; lessons ``lag`` batches later.

    Jaderberg et al. 2017, figure 2. With lag 0 a stage waits for the true gradient of the batch.
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
        return f"lag {self.lag}: an estimator learns from batch t behind batch t + {self.lag}, and waits for nobody"


@dataclass(frozen=True)
class Unanswered(Schedule):
    """Each stage forward, backward at once with a gradient of its own, and updated; nothing comes back to it."""

    receives: ClassVar[Kind] = "learn"

    @override
    def actions(self, n: int, own: range, last: int) -> Iterator[Action]:
        yield from _at_once(n, own)

    @override
    def describe(self) -> str:
        return "gradients of their own"

    @override
    def explain(self) -> str:
        return "a stage waits for states only: no gradient comes back"


@dataclass(frozen=True)
class Arriving(Schedule):
    """Each stage forward, backward at once with a gradient of its own, and again when the true one arrives.

    In round n stage i goes backward on piece n, and again on piece n - d_i, d_i = M - 1 - i: nobody waits. An update
    has the first gradients of one batch and the second ones of an earlier batch. So true gradients come down
    through all stages, a batch later with each. What arrives behind the last batch of an epoch only teaches.
    """

    receives: ClassVar[Kind] = "arrive"

    def sends(self, i: int, last: int) -> Kind:
        return "backward" if i == last else "arrive"

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

    def latency(self, last: int) -> int:
        return last

    def staleness(self, i: int, piece: int, last: int) -> int:
        return last - i

    def describe(self) -> str:
        return "gradients of their own at once, true ones when they arrive"

    def explain(self) -> str:
        return "A: a second backward pass, with a true gradient, a batch later than that of the stage behind"


@dataclass(frozen=True)
class Pipelined(Schedule):
    """In each round every stage goes forward on one piece and backward on an earlier one, which keeps all of them busy.

    Stage i goes backward on piece n - d_i in round n, d_i = (1 + slack) (M - 1 - i), and updates behind the last piece
    of a batch. Without a flush its gradients come late: with m pieces a batch, for piece j of one the weights have had
    ceil(max(0, d_i - j) / m) updates since the forward pass (Narayanan et al. 2019, PipeDream; Huo et al. 2018, DDG).

    Args:
        pieces: m.
        slack: 0, or 1: a round more between two stages, in which they may be out of step.
        flushes: whether the pipeline empties at the end of each batch: true gradients (1F1B, Narayanan et al. 2021).
    """

    pieces: int = 1
    slack: int = 0
    flushes: bool = False

    def delay(self, i: int, last: int) -> int:
        """d_i: how many rounds behind its forward pass a piece goes backward through stage i."""
        return (1 + self.slack) * (last - i)

    @override
    def lateness(self, i: int, last: int) -> float:
        return 0.0 if self.flushes or last == 0 else (last - i) / last

    @override
    def actions(self, n: int, own: range, last: int) -> Iterator[Action]:
        yield from (Action("forward", i, n) for i in own)
        first = n - n % self.pieces if self.flushes else 0  # earlier pieces are done with
        yield from self._backward(n, own, last, first)
        if self.flushes and n == first + self.pieces - 1:
            for k in range(n + 1, n + 1 + self.delay(0, last)):
                yield from (a for a in self._backward(k, own, last, first) if a.piece <= n)
            yield from (Action("update", i, n) for i in own)

    def _backward(self, n: int, own: range, last: int, first: int) -> Iterator[Action]:
        # The gradient at a worker's first boundary leaves first.
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
        pieces = f"{self.pieces} microbatch{'es' if self.pieces > 1 else ''} a batch"
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
    """Each stage in turn forward, backward and updated, waiting for nothing that comes up."""
    for i in own:
        yield Action("forward", i, n)
        yield Action("backward", i, n)
        yield Action("update", i, n)


def stage_names(stages: Sequence[int], part: str = "stage") -> str:
    """Neighbouring stages by number: ``stage 0`` or ``stages 0-1``; ``part``: what they are called."""
    return f"{part} {stages[0]}" if len(stages) == 1 else f"{part}s {stages[0]}-{stages[-1]}"
