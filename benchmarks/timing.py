"""Measuring in turn: wall time, CPU time and page faults, their medians and ratios."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from resource import RUSAGE_SELF, getrusage
from statistics import median
from time import perf_counter, process_time
from typing import TypeVar

from trees import location

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


def in_turn(runs: Mapping[K, Callable[[], T]], rounds: int, warm_up: int = 0) -> Iterator[dict[K, T]]:
    """Run all of them one after the other (A B C A B C ...) and yield the results of each round.

    Args:
        runs: what to run, by name. rounds: how often. warm_up: further rounds at first, whose results are left out.
    """
    for i in range(-warm_up, rounds):
        results = {name: run() for name, run in runs.items()}
        if i >= 0:
            yield results


def by_name(rounds: Iterable[Mapping[K, T]]) -> dict[K, list[T]]:
    """The results of `in_turn` as one list for each name."""
    lists: dict[K, list[T]] = {}
    for results in rounds:
        for name, result in results.items():
            lists.setdefault(name, []).append(result)
    return lists


def ratios(numerators: Iterable[float], denominators: Iterable[float]) -> list[float]:
    """One ratio for each round."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest value."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def cpu_s_each(work: Callable[[], object], seconds: float) -> float:
    """CPU seconds of one piece of work, done again and again for about so many seconds."""
    count, start = 0, process_time()
    while (elapsed := process_time() - start) < seconds or not count:
        work()
        count += 1
    return elapsed / count


def page_faults() -> int:
    """How often this process has had to wait for memory that the system gave it anew."""
    return getrusage(RUSAGE_SELF).ru_minflt


@dataclass(frozen=True)
class Length:
    """The batches of a training that is measured.

    Attributes:
        measured: number of batches that count. warm_up: batches before these.
        cool_down: batches after these, so that no process measures how it waits for the others to finish.
    """

    measured: int
    warm_up: int = 3
    cool_down: int = 2

    @property
    def total(self) -> int:
        """Number of all batches."""
        return self.warm_up + self.measured + self.cool_down

    def batches(self, pool: Iterable[T]) -> Iterator[T]:
        """So many batches of a pool, which begins anew at its end."""
        return islice(cycle(pool), self.total)


@dataclass
class ProcessTimes:
    """What one process measures while it trains.

    Attributes:
        start, end: of the measured batches, by a clock that all processes share, in seconds.
        cpu_s: CPU seconds of this process between them. page_faults: in the same time.
        losses: mean loss of each batch, in processes that know it. tree: what sglight was imported from.
    """

    start: float = 0.0
    end: float = 0.0
    cpu_s: float = 0.0
    page_faults: int = 0
    losses: list[float] = field(default_factory=list)
    tree: str = field(default_factory=location)

    def batch_done(self, count: int, length: Length) -> None:
        """To be called after each batch with the number of batches done."""
        if count == length.warm_up:
            self.page_faults, self.cpu_s, self.start = -page_faults(), -process_time(), perf_counter()
        if count == length.warm_up + length.measured:
            self.end = perf_counter()
            self.cpu_s, self.page_faults = self.cpu_s + process_time(), self.page_faults + page_faults()


class Clock:
    """Measures named pieces of work in this process, round by round."""

    def __init__(self) -> None:
        self.times: dict[str, list[tuple[float, float, int]]] = {}

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Do the work, note what it took, and return its result."""
        faults, cpu, start = page_faults(), process_time(), perf_counter()
        result = work()
        end, cpu_end = perf_counter(), process_time()
        self.times.setdefault(name, []).append((end - start, cpu_end - cpu, page_faults() - faults))
        return result

    def medians(self, warm_up: int = 2) -> dict[str, dict[str, float]]:
        """Wall and CPU milliseconds and page faults of each piece, without its first ``warm_up`` times."""
        result = {}
        for name, times in self.times.items():
            wall, cpu, faults = (median(values) for values in zip(*times[warm_up:], strict=True))
            result[name] = {"wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu, "page_faults": faults}
        return result
