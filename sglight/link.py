"""The interface between stages and between workers, and its implementation for a single process.

A strategy gets a `Placement`: which stages are in its process, and for each of their boundaries two `Channel` objects,
one for each direction. The training step is the same whether the other end of a channel is in this process
(`LocalChannel`) or in another one (`sglight.parallel`).
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
        waiting: makes a context that is entered while it waits, by which a supervisor can tell waiting from hanging.
        waited_s: seconds spent waiting.
    """

    waiting: Waiting = nullcontext
    waited_s = 0.0

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Context in which this worker waits for another one."""
        start = perf_counter()
        try:
            with self.waiting():
                yield
        finally:
            self.waited_s += perf_counter() - start


class Channel(Waits, ABC):
    """One direction of a boundary: a queue of tensors.

    A process has the sending end (`Sender`), the receiving end (`Receiver`), or both (`LocalChannel`).

    Attributes:
        waited_s: seconds spent waiting for the other end.
        moved_s: seconds spent copying.
        lends: whether the tensor from `receive` is overwritten by the next call.
    """

    moved_s = 0.0
    lends = True

    @abstractmethod
    def send(self, tensor: Tensor) -> None:
        """Send a tensor, which must not be changed afterwards.

        Returns before it has arrived, but waits while the channel is full.

        Raises:
            PeerLost: if the worker at the other end has ended.
        """

    @abstractmethod
    def receive(self, shape: Sequence[int]) -> Tensor:
        """The next tensor, which must have that shape. If the channel `lends`, it is valid until the next call.

        Raises:
            PeerLost: if the worker at the other end has ended, or sent a tensor of another shape.
        """

    def close(self) -> None:
        """Release the resources of the channel; tensors that were not received are lost."""


class Sender(Channel):
    """The sending end of a channel to another process."""

    @override
    def receive(self, shape: Sequence[int]) -> Tensor:
        raise AssertionError("the receiving end is in another process")


class Receiver(Channel):
    """The receiving end of a channel from another process."""

    @override
    def send(self, tensor: Tensor) -> None:
        raise AssertionError("the sending end is in another process")


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
    """A result that may not have arrived yet."""

    @abstractmethod
    def ready(self) -> bool:
        """Whether `result` returns at once."""

    @abstractmethod
    def result(self) -> list[float]:
        """The result; waits until it is there."""


class Peers(Waits, ABC):
    """All workers of a run, for collective calls. Every worker must make the same calls in the same order.

    Attributes:
        rank: of this worker, from 0.
        size: the number of workers.
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
        """Whether all workers end at this point, because one of them got a signal: its number, or None.

        Args:
            point: a number that grows from call to call, the same at all workers.
            signum: the signal that this worker got; None for none.
        """

    def close(self) -> None:
        """Leave the group of workers."""


class Alone(Peers):
    """The only worker of a run, which has all stages."""

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
    """The workers with the same stages, each of which trains on its part of every batch.

    This class is for one worker alone, which has the whole batch. All replicas must make the same calls in the same
    order.

    Attributes:
        rank: the number of this worker among them, from 0.
        size: R, their number.

    >>> import torch
    >>> Replicas().share(torch.arange(3))
    tensor([0, 1, 2])
    """

    rank, size = 0, 1

    def share(self, samples: Tensor) -> Tensor:
        """This worker's part of a batch, or of a piece of it; the sizes of parts differ by at most one."""
        return samples if self.size == 1 else samples.tensor_split(self.size)[self.rank]

    def begin_sum(self, values: Tensor) -> Callable[[], None]:
        """Start to replace ``values`` by their sum over the replicas; returns a function that waits for it."""
        return _nothing

    def sum(self, values: Tensor) -> Tensor:
        """Replace ``values`` by their sum over the replicas, and return them."""
        self.begin_sum(values)()
        return values

    def close(self) -> None:
        """End the connections to the other replicas."""


def _nothing() -> None:
    pass


class Known(Pending):
    """A result that is there already."""

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
    """Which of M stages are in this process, and the channels to their neighbours.

    Attributes:
        own: the numbers of these stages, which are consecutive.
        states: for each boundary of these stages the channel of states, from stage i to stage i + 1, under the key i.
        gradients: the same for gradients, from stage i + 1 to stage i.
        peers: all workers.
        pipeline: those of them, in the order of their stages, that hold each stage once.
        replicas: those of them that hold the same stages as this one.
        statistics: those over whose samples batch normalisation takes its means: the replicas, or this one alone.
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
        """The channels of all boundaries, in both directions."""
        return [*self.states.values(), *self.gradients.values()]


def alone(stages: int) -> Placement:
    """The placement with all stages in this process.

    >>> placement = alone(stages=3)
    >>> placement.own, sorted(placement.states)
    (range(0, 3), [0, 1])
    """
    peers = Alone()
    return Placement(range(stages), local_channels(stages), local_channels(stages), peers, peers)


def local_channels(stages: int) -> dict[int, Channel]:
    """A channel for each boundary between stages of one process."""
    return {i: LocalChannel() for i in range(stages - 1)}
