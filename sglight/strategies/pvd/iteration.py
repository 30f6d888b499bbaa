"""The iterations of parallel variable distribution, by the processors that live here and their like elsewhere."""

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
    """What is fixed while the processors are at work.

    Attributes:
        start: the point from which it goes. directions: one a block.
        serial_s: seconds that finding them took besides the processors' shares.
    """

    start: Evaluated
    directions: Point
    serial_s: float


@dataclass
class Progress:
    """What an iteration knows of those before it.

    Attributes:
        evaluations: passes through the training set until now, by what for.
        reached: value and accuracy behind the last iteration; None before the first.
        is_resumed: whether they come from another training, whose data and penalties may have been others.
        interrupted: an iteration to go on with: its directions, and the processors' positions by name.
    """

    evaluations: dict[str, float] = field(default_factory=lambda: {"gradient": 0.0, "function": 0.0})
    reached: tuple[float, float] | None = None
    is_resumed: bool = False
    interrupted: tuple[Point, dict[str, Any]] | None = None


class Iterations:
    """Begins iterations and ends them; between the two the processors descend on batches.

    Args:
        shared: f. samples: of which it is the mean, at most ``largest`` of which pass the network at once.
        processors: those here, by number. directions: the rule for them.
        synchronise: the next point, from the present one and the candidates.
        progress: so far.

    Attributes:
        current: the iteration under way.
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
        """Choose the samples of f, evaluate the weights, and find the directions; or go on where a checkpoint was.

        Args:
            loader: of the training set. number: of the iteration.

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
            self._go_on(x, *self._progress.interrupted)
            return
        start = self._start(x)
        directions = self._directions(self.shared.differentiate(x, "directions")[1])
        for processor in self.processors.values():
            processor.begin(x, directions)
        self.current = Iteration(start, directions, watch.serial_s())

    def end(self) -> dict[str, float]:
        """Exchange the candidates and go to the next point; returns what the iteration has come to, by name."""
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
        """Where the processors here are, by name."""
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
        """After a resumption: f may be another than before."""
        self._progress.is_resumed = False
        now = self.shared.evaluate(x, "directions")
        self._progress.reached = now.value, now.accuracy
        # A training that was not interrupted does without.
        self.shared.forget()

    def _go_on(self, x: Point, directions: Point, positions: Mapping[str, Any]) -> None:
        """Take up an iteration where it was interrupted."""
        directions = [d.to(block) for d, block in zip(directions, x, strict=True)]
        for i, processor in self.processors.items():
            processor.resume(x, directions, positions[f"processor_{i}"])
        assert self._progress.reached is not None
        self.current = Iteration(Evaluated(x, *self._progress.reached), directions, 0.0)
        self._progress.interrupted = None

    def _costs(self, serial_s: float) -> dict[str, float]:
        """What an iteration has cost on all processors, by name, and the evaluations until now."""
        tallies, serial_s = self.shared.costs(serial_s)
        evaluations = self._progress.evaluations
        for kind in evaluations:
            evaluations[kind] += sum(tally.samples[kind] for tally in tallies) / self._samples.total
        counts = {f"pvd/{kind}_evaluations": number for kind, number in evaluations.items()}
        return {**counts, **times(tallies, serial_s)}


def outcome(
    start: Evaluated, candidates: list[Evaluated], scalars: list[list[float]], result: Synchronised
) -> dict[str, float]:
    """What an iteration has come to, by name; ``scalars``: each processor's, by foreign block in order."""
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
