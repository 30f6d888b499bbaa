"""An objective that p processors evaluate together, on any number of workers, each on a part of the samples.

Sums of losses are exact, and the parts of a gradient are added in the order of the processors, so that the result does
not depend on which worker computes what, bit for bit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Any

import torch

from sglight.link import Peers, Placement
from sglight.strategies.pvd.objective import Chunk, Evaluated, Objective, Point, Sums, mean_plus, totals
from sglight.strategies.pvd.samples import shares
from sglight.strategies.recorder import Recorder

PHASES = ("directions", "local", "synchronisation")  # of an iteration, one after the other
KINDS = ("gradient", "function")  # what is computed for a sample


@dataclass
class Tally:
    """The work of a processor.

    Attributes:
        seconds: by phase.
        samples: how many samples were computed, by kind: with their ``gradient``, or only the ``function``.
    """

    seconds: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    samples: defaultdict[str, int] = field(default_factory=partial(defaultdict, int))


class SharedObjective:
    """f, evaluated by all processors together: each computes a part of the samples.

    All workers must make the same calls in the same order, except for `alone`.

    Args:
        objective: of this worker.
        placement: its ``own`` are the processors of this worker.
        processors: p.
        recorder: of the time spent waiting for other workers.

    Attributes:
        tallies: the work of each processor of this worker since `forget`.
    """

    def __init__(
        self, objective: Objective, placement: Placement, processors: int, recorder: Recorder
    ) -> None:
        self.objective = objective
        self.tallies: dict[int, Tally] = {}
        self._placement, self._processors, self._recorder = placement, processors, recorder
        self._samples: list[list[Chunk]] = []  # by processor
        self._normaliser = 0.0

    def use(self, samples: Chunk, largest: int) -> None:
        """Set the samples of f, and the largest number of them in a chunk."""
        self._samples = shares(samples, self._processors, largest)
        self._normaliser = self.objective.normaliser(self.samples)

    def forget(self) -> None:
        """Begin to count anew."""
        self.tallies = {i: Tally() for i in self._placement.own}

    @property
    def samples(self) -> list[Chunk]:
        """All samples of f, in order."""
        return list(chain(*self._samples))

    @property
    def size(self) -> int:
        """The number of samples of f."""
        return _count(self.samples)

    def evaluate(self, x: Point, phase: str = "synchronisation") -> Evaluated:
        """f at a point."""
        own: dict[int, list[Sums]] = {}
        for i in self._placement.own:
            with self.counted(i, phase, self._samples[i], "function"):
                own[i] = self.objective.sums(x, self._samples[i], i)
        return self._evaluated(x, chain(*self.gather(own).values()))

    def differentiate(self, x: Point, phase: str = "synchronisation") -> tuple[float, Point]:
        """f at a point and its gradient."""
        own: dict[int, tuple[list[Sums], Point]] = {}
        for i in self._placement.own:
            with self.counted(i, phase, self._samples[i], "gradient"):
                own[i] = self.objective.loss_gradient(x, self._samples[i], processor=i)
        parts = self.gather(own).values()
        total = totals(chain(*(sums for sums, _ in parts)))
        penalties, extra = self.objective.penalties(x)
        gradient = [g.to(block.device) for g, block in zip(_sum([g for _, g in parts]), x, strict=True)]
        return total.loss / self._normaliser + penalties, mean_plus(gradient, self._normaliser, extra)

    def alone(self, processor: int, x: Point, phase: str) -> Evaluated:
        """f at a point, evaluated by one processor; the same value as by `evaluate`."""
        with self.counted(processor, phase, self.samples, "function"):
            sums = self.objective.sums(x, self.samples, processor)
        return self._evaluated(x, sums)

    def gather(self, own: dict[int, Any]) -> dict[int, Any]:
        """The values of all processors by number, given those of this worker; tensors may be on the CPU."""
        with self._waiting():
            everyone = self._placement.peers.share(own)
        return {i: part for parts in everyone for i, part in parts.items()}

    def stopwatch(self, phase: str) -> Stopwatch:
        """A stopwatch, started now, for the time of a phase without the processors' shares of the work."""
        return Stopwatch(self, self._placement.peers, phase)

    def costs(self, serial_s: float) -> tuple[list[Tally], float]:
        """The tallies of all processors, and the ``serial_s`` of worker 0."""
        peers, rows = self._placement.peers, list[list[float]]()
        for i in range(self._processors):
            tally = self.tallies.get(i, Tally())
            rows.append([*(tally.seconds[p] for p in PHASES), *(float(tally.samples[k]) for k in KINDS)])
        with self._waiting():
            *flat, serial_s = peers.total([*chain(*rows), serial_s if peers.rank == 0 else 0.0]).result()
        tallies = []
        for i in range(self._processors):
            row = flat[i * len(rows[0]) : (i + 1) * len(rows[0])]
            tally = Tally()
            tally.seconds.update(zip(PHASES, row, strict=False))
            tally.samples.update(zip(KINDS, map(int, row[len(PHASES) :]), strict=True))
            tallies.append(tally)
        return tallies, serial_s

    @contextmanager
    def counted(self, processor: int, phase: str, chunks: Sequence[Chunk], kind: str) -> Iterator[None]:
        """Context that adds to a processor's `Tally` the samples that are computed, and the time that it takes."""
        tally, began = self.tallies[processor], now(chunks)
        yield
        tally.seconds[phase] += now(chunks) - began
        tally.samples[kind] += _count(chunks)

    def _waiting(self) -> Any:
        return self._recorder.phase("wait", self._placement.own[0])

    def _evaluated(self, x: Point, sums: Iterable[Sums]) -> Evaluated:
        loss, hits = totals(sums)
        value = loss / self._normaliser + self.objective.penalties(x, [])[0]
        return Evaluated(x, value if math.isfinite(value) else math.inf, hits / self.size)


class Stopwatch:
    """Measures the time of a phase in which this worker neither does its processors' shares nor waits for others."""

    def __init__(self, shared: SharedObjective, peers: Peers, phase: str) -> None:
        self._shared, self._peers, self._phase = shared, peers, phase
        self._began, self._waited = perf_counter(), peers.waited_s

    def serial_s(self) -> float:
        """These seconds since the start."""
        parts = sum(tally.seconds[self._phase] for tally in self._shared.tallies.values())
        return perf_counter() - self._began - parts - (self._peers.waited_s - self._waited)


def times(tallies: Sequence[Tally], serial_s: float) -> dict[str, float]:
    """The seconds of all processors by phase, and the ideal speed-up with a worker for each, by name.

    The speed-up is the sum of all seconds, divided by the sum over the phases of those of the slowest processor;
    ``serial_s``, which every worker spends, is added to both.
    """
    seconds = {phase: [tally.seconds[phase] for tally in tallies] for phase in PHASES}
    in_turn = serial_s + sum(map(sum, seconds.values()))
    at_once = serial_s + sum(map(max, seconds.values()))
    each = {f"time/processor_{i}/{phase}_s": s for phase, all_ in seconds.items() for i, s in enumerate(all_)}
    return {**each, "time/iteration_rest_s": serial_s, "speedup/theoretical": in_turn / at_once}


def now(chunks: Sequence[Chunk]) -> float:
    """The time, after waiting for the device of these samples."""
    if chunks and chunks[0][0].is_cuda:
        torch.cuda.synchronize()
    return perf_counter()


def _count(chunks: Sequence[Chunk]) -> int:
    return sum(len(labels) for _, labels in chunks)


def _sum(parts: Sequence[Point]) -> Point:
    """The sum of points, in their order."""
    total = [block.clone() for block in parts[0]]
    for part in parts[1:]:
        for block, more in zip(total, part, strict=True):
            block += more
    return total
