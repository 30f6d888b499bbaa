"""The iterations of parallel variable distribution: how each begins and ends, on all workers together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglight.errors import UserError
from sglight.strategies.pvd.directions import Directions
from sglight.strategies.pvd.objective import Evaluated, Point
from sglight.strategies.pvd.processor import Processor
from sglight.strategies.pvd.samples import Samples
from sglight.strategies.pvd.sharing import SharedObjective, times
from sglight.strategies.pvd.subproblem import candidate
from sglight.strategies.pvd.synchronisation import Synchronised


@dataclass
class Iteration:
    """The constants of an iteration.

    Attributes:
        start: the point at which it begins.
        directions: one for each block.
        serial_s: seconds that the directions took, without the processors' shares of the work.
    """

    start: Evaluated
    directions: Point
    serial_s: float


@dataclass
class Progress:
    """The results of earlier iterations that the next one needs.

    Attributes:
        evaluations: the number of passes through the training set so far, by kind.
        reached: value and accuracy after the last iteration; None before the first.
        is_resumed: whether they come from a checkpoint, so that data and penalties may have changed.
        interrupted: an iteration that was interrupted: its directions, and the positions of the processors by name.
    """

    evaluations: dict[str, float] = field(default_factory=lambda: {"gradient": 0.0, "function": 0.0})
    reached: tuple[float, float] | None = None
    is_resumed: bool = False
    interrupted: tuple[Point, dict[str, Any]] | None = None


class Iterations:
    """Begins and ends iterations; in between, the processors take their steps on the batches.

    Args:
        shared: evaluates f.
        samples: chooses the samples of f.
        largest: the largest number of samples in a batch of the network.
        processors: of this worker, by number.
        directions: computes the directions.
        synchronise: computes the next point from the present one and the candidates.
        progress: of earlier iterations.

    Attributes:
        current: the present iteration; None between two.
    """

    def __init__(
        self,
        shared: SharedObjective,
        samples: Samples,
        largest: int,
        processors: Mapping[int, Processor],
        directions: Directions,
        synchronise: Callable[[Evaluated, Sequence[Evaluated]], Synchronised],
        progress: Progress,
    ) -> None:
        self.shared, self.processors = shared, processors
        self.current: Iteration | None = None
        self._samples, self._largest = samples, largest
        self._directions, self._synchronise, self._progress = directions, synchronise, progress

    def begin(self, loader: Any, number: int) -> None:
        """Choose the samples of f, evaluate f and compute the directions; or resume an interrupted iteration.

        Args:
            loader: of the training set.
            number: of the iteration.

        Raises:
            UserError: if f is not finite.
        """
        watch = self.shared.stopwatch("directions")
        self.shared.forget()
        x = self.shared.objective.read()
        if (samples := self._samples.choose(loader, number, like=x[0])) is not None:
            self.shared.use(samples, self._largest)
        if self._progress.is_resumed:
            self._evaluate_again(x)
        if self._progress.interrupted is not None:
            self._resume(x, *self._progress.interrupted)
            return
        start = self._start(x)
        directions = self._directions(self.shared.differentiate(x, "directions")[1])
        for processor in self.processors.values():
            processor.begin(x, directions)
        self.current = Iteration(start, directions, watch.serial_s())

    def end(self) -> dict[str, float]:
        """Exchange the candidates and go to the next point; returns the results of the iteration by name."""
        assert self.current is not None
        start, directions = self.current.start, self.current.directions
        offers = self.shared.gather({i: p.candidate(start, directions) for i, p in self.processors.items()})
        watch = self.shared.stopwatch("synchronisation")
        candidates, scalars = list[Evaluated](), list[list[float]]()
        for i, (block, m, value, accuracy) in offers.items():
            device = start.point[i].device
            point = candidate(start.point, directions, i, block.to(device), m.to(device))
            candidates.append(Evaluated(point, value, accuracy))
            scalars.append(m.tolist())
        result = self._synchronise(start, candidates)
        self.shared.objective.write(result.reached.point)
        self._progress.reached = result.reached.value, result.reached.accuracy
        costs = self._costs(self.current.serial_s + watch.serial_s())
        self.current = None
        return outcome(start, candidates, scalars, result) | costs

    def positions(self) -> dict[str, Any]:
        """The positions of the processors of this worker, by name."""
        return {f"processor_{i}": processor.position() for i, processor in self.processors.items()}

    def _start(self, x: Point) -> Evaluated:
        known = self._progress.reached if self._samples.are_fixed else None
        start = self.shared.evaluate(x, "directions") if known is None else Evaluated(x, *known)
        if start.value == math.inf:
            raise UserError(
                "the loss is not finite before the training: lower model.horizon or model.init_scale"
            )
        return start

    def _evaluate_again(self, x: Point) -> None:
        """Evaluate f after a checkpoint was loaded, because data or penalties may have changed."""
        self._progress.is_resumed = False
        now = self.shared.evaluate(x, "directions")
        self._progress.reached = now.value, now.accuracy
        # Not counted, because a training that was not interrupted does not need it.
        self.shared.forget()

    def _resume(self, x: Point, directions: Point, positions: Mapping[str, Any]) -> None:
        """Continue an iteration that was interrupted."""
        directions = [d.to(block) for d, block in zip(directions, x, strict=True)]
        for i, processor in self.processors.items():
            processor.resume(x, directions, positions[f"processor_{i}"])
        assert self._progress.reached is not None
        self.current = Iteration(Evaluated(x, *self._progress.reached), directions, 0.0)
        self._progress.interrupted = None

    def _costs(self, serial_s: float) -> dict[str, float]:
        """The costs of the iteration on all processors, and the evaluations so far, by name."""
        tallies, serial_s = self.shared.costs(serial_s)
        evaluations = self._progress.evaluations
        for kind in evaluations:
            evaluations[kind] += sum(tally.samples[kind] for tally in tallies) / self._samples.total
        counts = {f"pvd/{kind}_evaluations": number for kind, number in evaluations.items()}
        return {**counts, **times(tallies, serial_s)}


def outcome(
    start: Evaluated, candidates: list[Evaluated], scalars: list[list[float]], result: Synchronised
) -> dict[str, float]:
    """The results of an iteration, by name.

    Args:
        start: the point at which it began.
        candidates: of the processors.
        scalars: of each processor, one for each block of another one, in order.
        result: of the synchronisation.
    """
    found = {
        "pvd/objective_before": start.value,
        "pvd/objective_after": result.reached.value,
        "pvd/accuracy": result.reached.accuracy,
        "pvd/winner": float(result.winner),
        "pvd/weight_current": result.weights[0],
    }
    for i, (candidate_i, ms) in enumerate(zip(candidates, scalars, strict=True)):
        found |= {f"pvd/candidate_{i}": candidate_i.value, f"pvd/weight_{i}": result.weights[i + 1]}
        foreign = (j for j in range(len(candidates)) if j != i)
        found |= {f"pvd/scalar_{i}_{j}": m for j, m in zip(foreign, ms, strict=False)}
    return found
