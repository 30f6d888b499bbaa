"""A processor of parallel variable distribution: its steps on batches, and the point that it returns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sglight.strategies.pvd.acceptance import Acceptance
from sglight.strategies.pvd.local import LocalSolver, Step
from sglight.strategies.pvd.objective import Chunk, Evaluated, Point, Sums
from sglight.strategies.pvd.sharing import SharedObjective
from sglight.strategies.pvd.subproblem import Subproblem

# What a processor returns: its block, its scalars, and the objective and accuracy there.
Candidate = tuple[Tensor, Tensor, float, float]
# The state of a processor between two batches: block, scalars, and the number of samples so far, by kind.
Position = tuple[Tensor, Tensor, dict[str, int]]


class Processor:
    """Processor l of p, on this worker.

    Args:
        problem: the subproblem that it minimises.
        solver: the local solver.
        acceptance: the rule by which its point is accepted.
        shared: the objective, on whose samples its point is evaluated.

    Attributes:
        own: l.
        optimizer: of the local solver, for the variables of this processor.
    """

    def __init__(
        self, problem: Subproblem, solver: LocalSolver, acceptance: Acceptance, shared: SharedObjective
    ) -> None:
        self.own = problem.own
        self.optimizer = solver.optimizer(problem.variables)
        self._problem, self._solver, self._acceptance, self._shared = problem, solver, acceptance, shared

    def begin(self, x: Point, directions: Point) -> None:
        """Begin an iteration at x."""
        self._problem.begin(x, directions)

    def descend(self, chunks: Sequence[Chunk], step: Step) -> Sums:
        """Take the steps of the local solver on a batch; returns the sums at the point before them.

        Args:
            chunks: the batch.
            step: steps the optimiser.
        """
        problem, seen = self._problem, list[Sums]()

        def closure() -> float:
            with self._shared.counted(self.own, "local", chunks, "gradient"):
                sums, value, gradient = self._shared.objective.on_batch(
                    problem.point(), chunks, problem.wanted, self.own
                )
            seen.append(sums)
            problem.pull_back(gradient)
            return value

        self._solver.descend(self.optimizer, closure, step)
        return seen[0]

    def candidate(self, start: Evaluated, directions: Point) -> Candidate:
        """The result of an iteration: the present point, or the start if that is not accepted."""
        found = self._shared.alone(self.own, self._problem.point(), "local")
        if not self._acceptance.accepts(found, start):
            found = start
            self._problem.begin(start.point, directions)
            self._solver.restart(self.optimizer)
        return *self._variables(), found.value, found.accuracy

    def position(self) -> Position:
        """The state of the processor, for a checkpoint within an iteration."""
        return *self._variables(), dict(self._shared.tallies[self.own].samples)

    def resume(self, x: Point, directions: Point, position: Position) -> None:
        """Continue an iteration that began at x in a `Position`."""
        block, scalars, samples = position
        self._problem.begin(x, directions)
        self._problem.move(block, scalars)
        self._shared.tallies[self.own].samples.update(samples)

    def _variables(self) -> tuple[Tensor, Tensor]:
        return self._problem.block.detach().clone(), self._problem.scalars.detach().clone()
