"""What crosses a boundary between stages, and what workers tell each other; here for one process alone.

A strategy sees a `Placement`: which stages live in its process, and a `Channel` in each direction of each boundary
that it touches. Its training step is the same whether the other end of a channel is in this process (`LocalChannel`)
or in another (`sglight.parallel`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from torch import Tensor
from typing_extensions import override

Waiting = Callable[[], AbstractContextManager[Any]]


class Waits:
    """Something that may have to wait for another worker.

    Attributes:
        waiting: entered whenever it waits, so that a supervisor can tell waiting from hanging.
        waited_s: seconds spent so.
    """

    waiting: Waiting = nullcontext
    waited_s = 0.0

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """While this worker waits for another one."""
        start = perf_counter()
        try:
            with self.waiting():
                yield
        finally:
            self.waited_s += perf_counter() - start


class Channel(Waits, ABC):
    """One direction of a boundary: tensors come out in the order in which they went in.

    A process has the sending end, the receiving end, or both (`LocalChannel`).

    Attributes:
        waited_s: seconds spent waiting for the other end. moved_s: seconds spent copying.
        lends: whether what `receive` gives is valid until the next call only.
    """

    moved_s = 0.0
    lends = True

    @abstractmethod
    def send(self, tensor: Tensor) -> None:
        """Hand ``tensor`` on, which nobody changes afterwards.

        Returns before it has arrived, but waits while as many tensors as the channel holds are still on their way.

        Raises:
            PeerLost: if the other end has gone.
        """

    @abstractmethod
    def receive(self, shape: Sequence[int]) -> Tensor:
        """The next tensor, of that shape; it is valid until the next call.

        Raises:
            PeerLost: if the other end has gone, or sent something of another shape.
        """

    def close(self) -> None:
        """Release what the channel holds; what is on its way is lost."""


class Sender(Channel):
    """The end at which tensors go in."""

    @override
    def receive(self, shape: Sequence[int]) -> Tensor:
        raise AssertionError("they come out in another process")


class Receiver(Channel):
    """The end at which tensors come out."""

    @override
    def send(self, tensor: Tensor) -> None:
        raise AssertionError("they go in in another process")


class LocalChannel(Channel):
    """Both ends in one process: a queue."""

    lends = False

    def __init__(self) -> None:
        self._queue: deque[Tensor] = deque()

    @override
    def send(self, tensor: Tensor) -> None:
        self._queue.append(tensor)

    @override
    def receive(self, shape: Sequence[int]) -> Tensor:
        return self._queue.popleft()


class Pending(ABC):
    """A result that is still on its way."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether `result` returns at once."""

    @abstractmethod
    def result(self) -> list[float]:
        """Wait for it."""


class Peers(Waits, ABC):
    """All workers of a run, this one among them. Every worker makes the same calls in the same order.

    Attributes:
        rank: of this worker, from 0. size: W.
    """

    rank: int
    size: int

    @abstractmethod
    def total(self, values: Sequence[float]) -> Pending:
        """The sums over all workers, entry by entry in float64; does not wait."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """The values of all workers by rank, at worker 0; an empty list elsewhere. Tensors arrive on the CPU."""

    @abstractmethod
    def share(self, value: Any) -> list[Any]:
        """The values of all workers by rank, at every worker. Tensors arrive on the CPU."""

    @abstractmethod
    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of worker ``source``."""

    @abstractmethod
    def barrier(self) -> None:
        """Wait until all workers are here."""

    @abstractmethod
    def stops(self, point: int, signum: int | None) -> int | None:
        """The signal because of which all workers end at this point, if one of them has got one.

        Args:
            point: larger than that of the call before. signum: the signal that has reached this worker.
        """

    def close(self) -> None:
        """Leave."""


class Alone(Peers):
    """One process that has all stages."""

    rank, size = 0, 1

    @override
    def total(self, values: Sequence[float]) -> Pending:
        return Known(list(values))

    @override
    def gather(self, value: Any) -> list[Any]:
        return [value]

    @override
    def share(self, value: Any) -> list[Any]:
        return [value]

    @override
    def broadcast(self, value: Any, source: int = 0) -> Any:
        return value

    @override
    def barrier(self) -> None:
        pass

    @override
    def stops(self, point: int, signum: int | None) -> int | None:
        return signum


class Replicas(Waits):
    """The workers that hold the same stages and share each batch; this one is alone, and has all of it.

    Every one of them makes the same calls in the same order.

    Attributes:
        rank: of this worker among them, from 0. size: R.
    """

    rank, size = 0, 1

    def share(self, samples: Tensor) -> Tensor:
        """This worker's part of a batch, or of a piece of it: parts differ by one sample at most."""
        return samples if self.size == 1 else samples.tensor_split(self.size)[self.rank]

    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        """Begin to replace ``values`` by their sum over the replicas; the function returned waits for that."""
        return _nothing

    def sum(self, values: Tensor) -> Tensor:
        """``values``, replaced by their sum over the replicas."""
        self.begin_sum(values)()
        return values

    def close(self) -> None:
        """Leave."""


def _nothing() -> None:
    pass


class Known(Pending):
    """A result that is there."""

    def __init__(self, values: list[float]) -> None:
        self._values = values

    @override
    def ready(self) -> bool:
        return True

    @override
    def result(self) -> list[float]:
        return self._values


@dataclass
class Placement:
    """Which of M stages live in this process, and what leads to their neighbours.

    Attributes:
        own: numbers of the stages here, neighbours in order.
        states, gradients: for each boundary with an end here (behind stage i: key i) the channel down to stage i + 1,
            and that up from it.
        peers: all workers. pipeline: those of them, in the order of their stages, that hold each stage once.
        replicas: those that hold the same stages as this one. statistics: those over whose samples batch normalisation
            goes: they, or this one alone.
    """

    own: range
    states: dict[int, Channel]
    gradients: dict[int, Channel]
    peers: Peers
    pipeline: Peers
    replicas: Replicas = field(default_factory=Replicas)
    statistics: Replicas = field(default_factory=Replicas)

    @property
    def channels(self) -> list[Channel]:
        """Of all boundaries, in both directions."""
        return [*self.states.values(), *self.gradients.values()]


def alone(stages: int) -> Placement:
    """All stages in this process."""
    peers = Alone()
    return Placement(range(stages), local_channels(stages), local_channels(stages), peers, peers)


def local_channels(stages: int) -> dict[int, Channel]:
    """One for each boundary between stages of one process."""
    return {i: LocalChannel() for i in range(stages - 1)}
