"""The rules of synchronisation, and the whole method on a convex problem with a known solution."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sglight.strategies.pvd.directions import Directions
from sglight.strategies.pvd.objective import Evaluated, Point, flat
from sglight.strategies.pvd.subproblem import Subproblem
from sglight.strategies.pvd.synchronisation import (
    SYNCHRONISATIONS,
    Search,
    Synchronised,
    combined,
)

SIZES = [3, 4, 2, 3]


class LeastSquares:
    """f(x) = 1/2 ||A x - b||^2 in blocks of `SIZES`, with columns that are far from orthogonal."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        n = sum(SIZES)
        self.A = torch.randn(20, n, generator=generator, dtype=torch.float64)
        self.A += 0.5 * self.A.mean(1, keepdim=True).sign()
        self.b = torch.randn(20, generator=generator, dtype=torch.float64)
        self.solution = torch.linalg.lstsq(self.A, self.b).solution
        self.least = self.value(list(self.solution.split(SIZES)))

    def residual(self, x: Point) -> Tensor:
        return self.A @ flat(x) - self.b

    def value(self, x: Point) -> float:
        return 0.5 * float(self.residual(x).square().sum())

    def evaluate(self, x: Point) -> Evaluated:
        return Evaluated(x, self.value(x))

    def differentiate(self, x: Point) -> tuple[float, Point]:
        return self.value(x), list((self.A.T @ self.residual(x)).split(SIZES))

    def minimise(self, problem: Subproblem) -> Evaluated:
        """A processor's candidate, nearly exact."""
        solver = torch.optim.LBFGS(problem.variables, max_iter=30, line_search_fn="strong_wolfe")

        def closure() -> float:
            value, gradient = self.differentiate(problem.point())
            problem.pull_back([gradient[j] for j in problem.wanted])
            return value

        solver.step(closure)
        return self.evaluate(problem.point())

    def candidates(self, start: Evaluated, forget_me_not: bool) -> list[Evaluated]:
        """Of all processors."""
        d = Directions("normalised")(self.differentiate(start.point)[1])
        found = []
        for own in range(len(SIZES)):
            problem = Subproblem(own, start.point, forget_me_not)
            problem.begin(start.point, d)
            candidate = self.minimise(problem)
            found.append(candidate if candidate.no_worse_than(start) else start)
        return found

    def iterate(self, rule: str, iterations: int, forget_me_not: bool = True) -> list[float]:
        """How far the value is above the least, at the beginning and after each iteration."""
        search = Search(self.evaluate, self.differentiate, steps=20)
        reached = self.evaluate([torch.zeros(n, dtype=torch.float64) for n in SIZES])
        values = [reached.value]
        for _ in range(iterations):
            result = SYNCHRONISATIONS[rule](reached, self.candidates(reached, forget_me_not), search)
            reached = result.reached
            values.append(reached.value)
        return [value - self.least for value in values]


@pytest.mark.parametrize("rule", SYNCHRONISATIONS)
def test_least_squares_converge_to_the_solution(rule: str) -> None:
    excess = LeastSquares(0).iterate(rule, 60 if rule == "average" else 30)
    assert all(after <= before for before, after in pairwise(excess))
    assert excess[-1] < 1e-6 * excess[0]


@pytest.mark.parametrize("rule", ["best", "average"])
def test_without_forget_me_not_it_takes_longer(rule: str) -> None:
    for seed in range(2):
        problem = LeastSquares(seed)
        forgetful, faithful = (problem.iterate(rule, 10, forget_me_not=kept) for kept in (False, True))
        assert all(a < b for a, b in zip(faithful[1:], forgetful[1:], strict=True))
        assert faithful[-1] < 0.5 * forgetful[-1]


def test_affine_is_at_least_as_good_as_best_in_every_iteration() -> None:
    for seed in range(3):
        problem = LeastSquares(seed)
        search = Search(problem.evaluate, problem.differentiate, steps=4)
        reached = problem.evaluate([torch.zeros(n, dtype=torch.float64) for n in SIZES])
        for _ in range(12):
            found = problem.candidates(reached, forget_me_not=True)
            best, affine = (SYNCHRONISATIONS[rule](reached, found, search) for rule in ("best", "affine"))
            assert affine.reached.value <= best.reached.value
            reached = affine.reached


def test_affine_finds_the_least_value_of_the_hull() -> None:
    problem = LeastSquares(1)
    start = problem.evaluate([torch.ones(n, dtype=torch.float64) for n in SIZES])
    found = problem.candidates(start, forget_me_not=True)
    search = Search(problem.evaluate, problem.differentiate, steps=100)
    result = SYNCHRONISATIONS["affine"](start, found, search)
    edges = torch.stack([flat(c.point) - flat(start.point) for c in found], 1)
    w = torch.linalg.lstsq(problem.A @ edges, -problem.residual(start.point)).solution
    torch.testing.assert_close(torch.tensor(result.weights[1:]).double(), w, rtol=1e-4, atol=1e-4)


def quartic(x: Point) -> Evaluated:
    """Two valleys, at -1 and 1, and a ridge between them."""
    return Evaluated(x, float((x[0].square() - 1).square().sum()))


def at(*values: float) -> list[Evaluated]:
    return [quartic([torch.tensor([value])]) for value in values]


def run(rule: str, start: float, *candidates: float) -> Synchronised:
    def differentiate(x: Point) -> tuple[float, Point]:
        return quartic(x).value, [4 * x[0] * (x[0].square() - 1)]

    return SYNCHRONISATIONS[rule](at(start)[0], at(*candidates), Search(quartic, differentiate))


def test_the_average_of_two_valleys_is_refused() -> None:
    result = run("average", 0.5, -0.9, 1.1)
    assert result.reached.value == min(found.value for found in at(-0.9, 1.1))
    assert result.weights == [0, 1, 0] and result.winner == 0


def test_the_average_within_a_valley_is_taken() -> None:
    result = run("average", 0.3, 0.8, 1.1)
    assert result.weights == [0, 0.5, 0.5]
    assert float(result.reached.point[0]) == pytest.approx(0.95)


@pytest.mark.parametrize("rule", SYNCHRONISATIONS)
def test_weights_make_the_point_and_their_sum_is_one(rule: str) -> None:
    result = run(rule, 0.3, 0.8, 1.2)
    assert sum(result.weights) == pytest.approx(1)
    points = [found.point for found in at(0.8, 1.2)]
    made = combined(at(0.3)[0].point, points, result.weights[1:])
    torch.testing.assert_close(made[0], result.reached.point[0])


@pytest.mark.parametrize("rule", SYNCHRONISATIONS)
def test_where_nobody_has_moved_nothing_moves(rule: str) -> None:
    assert torch.equal(run(rule, 0.5, 0.5, 0.5).reached.point[0], torch.tensor([0.5]))
