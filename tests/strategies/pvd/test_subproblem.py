"""The forget-me-not terms against numerical differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sglight.strategies.pvd.objective import Point
from sglight.strategies.pvd.subproblem import Subproblem, candidate
from tests.strategies.pvd.common import point


def f(x: Point) -> Tensor:
    """Something that couples all blocks."""
    a, b, c = x
    return (a.sin().sum() * b.prod() + c.square().sum() * a[0]).exp().log1p()


def gradient(x: Point, blocks: list[int]) -> Point:
    x = [block.clone().requires_grad_() for block in x]
    return list(torch.autograd.grad(f(x), [x[j] for j in blocks]))


@pytest.mark.parametrize("own", range(3))
def test_the_gradient_of_all_variables_is_the_numerical_one(own: int) -> None:
    problem = Subproblem(own, point(0), forget_me_not=True)
    problem.begin(point(0), point(1))
    problem.move(point(2)[own], torch.tensor([0.3, -0.2], dtype=torch.float64))
    problem.pull_back(gradient(problem.point(), problem.wanted))
    eps = 1e-6
    for variable in problem.variables:
        assert variable.grad is not None
        for k in range(len(variable)):
            values = []
            for step in (eps, -eps):
                with torch.no_grad():
                    variable[k] += step
                    values.append(f(problem.point()))
                    variable[k] -= step
            assert float(variable.grad[k]) == pytest.approx(
                float(values[0] - values[1]) / (2 * eps), rel=1e-6
            )


def test_a_candidate_is_its_own_block_and_the_others_moved() -> None:
    x, d = point(0), point(1)
    scalars = torch.tensor([2.0, -1.0], dtype=torch.float64)
    found = candidate(x, d, 1, point(2)[1], scalars)
    expected = [x[0] + 2 * d[0], point(2)[1], x[2] - d[2]]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_without_forget_me_not_the_others_stay() -> None:
    x = point(0)
    problem = Subproblem(1, x, forget_me_not=False)
    problem.begin(x, point(1))
    problem.move(point(2)[1], torch.zeros(0))
    assert problem.variables == [problem.block] and problem.wanted == [1]
    found = problem.point()
    assert torch.equal(found[0], x[0]) and torch.equal(found[1], point(2)[1]) and torch.equal(found[2], x[2])


def test_a_point_does_not_change_with_the_variables() -> None:
    problem = Subproblem(0, point(0), forget_me_not=True)
    found = problem.point()
    problem.move(point(2)[0], torch.ones(2))
    assert all(torch.equal(a, b) for a, b in zip(found, point(0), strict=True))
