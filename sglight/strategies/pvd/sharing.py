"""An objective that p processors evaluate together, wherever they live, each on its share of the samples.

Sums of losses are exact, and the parts of a gradient are added in the order of the processors: the result does not
depend on who computes what, bit for bit.
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

# Parts of an iteration; each waits for the one before it.
PHASES = ("directions", "local", "synchronisation")
# What samples pass the network for.
KINDS = ("gradient", "function")


@dataclass
class Tally:
    """What a processor has done.

    Attributes:
        seconds: by phase. samples: how many passed, by what for: their ``gradient`` or only the ``function``.
    """

    seconds: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))
    samples: defaultdict[str, int] = field(default_factory=partial(defaultdict, int))


class SharedObjective:
    """f, evaluated by all processors together; all workers make the same calls in the same order, but for `alone`.

    Args:
        objective: here. placement: its ``own`` are the processors here. processors: p.
        recorder: of the times that are spent waiting for others.

    Attributes:
        tallies: of the processors here, since `forget`.
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
        """The samples of f, in chunks of so many at most."""
        self._samples = shares(samples, self._processors, largest)
        self._normaliser = self.objective.normaliser(self.samples)

    def forget(self) -> None:
        """Begin to count."""
        self.tallies = {i: Tally() for i in self._placement.own}

    @property
    def samples(self) -> list[Chunk]:
        """All of them, in order."""
        return list(chain(*self._samples))

    @property
    def size(self) -> int:
        """How many samples f is the mean of."""
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
        """f at a point, evaluated by one processor: the same value as `evaluate`'s."""
        with self.counted(processor, phase, self.samples, "function"):
            sums = self.objective.sums(x, self.samples, processor)
        return self._evaluated(x, sums)

    def gather(self, own: dict[int, Any]) -> dict[int, Any]:
        """What each processor has, of those here and elsewhere, in order; tensors may be on the CPU."""
        with self._waiting():
            everyone = self._placement.peers.share(own)
        return {i: part for parts in everyone for i, part in parts.items()}

    def stopwatch(self, phase: str) -> Stopwatch:
        """Started now, for what the phase takes besides the processors' shares."""
        return Stopwatch(self, self._placement.peers, phase)

    def costs(self, serial_s: float) -> tuple[list[Tally], float]:
        """All processors' tallies, and the seconds that worker 0 gives."""
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
        """Count what a processor does with these samples, see `Tally`, and how long it takes."""
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
    """Measures the seconds in which this worker neither does the processors' shares of a phase nor waits for others."""

    def __init__(self, shared: SharedObjective, peers: Peers, phase: str) -> None:
        self._shared, self._peers, self._phase = shared, peers, phase
        self._began, self._waited = perf_counter(), peers.waited_s

    def serial_s(self) -> float:
        """These seconds, since it was started."""
        parts = sum(tally.seconds[self._phase] for tally in self._shared.tallies.values())
        return perf_counter() - self._began - parts - (self._peers.waited_s - self._waited)


def times(tallies: Sequence[Tally], serial_s: float) -> dict[str, float]:
    """Seconds of all processors by phase, and what a worker for each would gain, by name.

    That is the sum of all seconds over those of the slowest in each phase; ``serial_s``, which everyone spends,
    counts in both.
    """
    seconds = {phase: [tally.seconds[phase] for tally in tallies] for phase in PHASES}
    in_turn = serial_s + sum(map(sum, seconds.values()))
    at_once = serial_s + sum(map(max, seconds.values()))
    each = {f"time/processor_{i}/{phase}_s": s for phase, all_ in seconds.items() for i, s in enumerate(all_)}
    return {**each, "time/iteration_rest_s": serial_s, "speedup/theoretical": in_turn / at_once}


def now(chunks: Sequence[Chunk]) -> float:
    """The time when the device of these samples has done what it was told."""
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
