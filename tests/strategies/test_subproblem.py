"""The forget-me-not terms against numerical differences, and the directions against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sglight.strategies.objective import Point
from sglight.strategies.subproblem import Directions, Subproblem, candidate

KINDS = ("gradient", "normalised", "rms")


def point(seed: int, sizes: tuple[int, ...] = (3, 2, 4)) -> Point:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]


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


@pytest.mark.parametrize("kind", KINDS)
def test_all_directions_descend_in_every_block(kind: str) -> None:
    directions = Directions(kind)
    for seed in range(3):
        g = point(seed)
        assert all(torch.dot(a, b) < 0 for a, b in zip(g, directions(g), strict=True))


def test_directions_are_what_they_are_called() -> None:
    g = [torch.tensor([3.0, -4.0]), torch.tensor([0.0, 0.0])]
    assert torch.equal(Directions("gradient")(g)[0], torch.tensor([-3.0, 4.0]))
    normalised = Directions("normalised")(g)
    assert normalised[0].norm() == pytest.approx(1) and torch.equal(normalised[1], torch.zeros(2))
    rms = Directions("rms")
    torch.testing.assert_close(rms(g)[0], torch.tensor([-1.0, 1.0]))
    assert torch.equal(rms(g)[1], torch.zeros(2))
    # After two equal gradients and one of half the size: v = (0.9^2 + 0.9 + 1/4) / (0.9^2 + 0.9 + 1) g^2.
    expected = 0.5 / ((0.81 + 0.9 + 0.25) / (0.81 + 0.9 + 1)) ** 0.5
    torch.testing.assert_close(rms([block / 2 for block in g])[0], torch.tensor([-expected, expected]))


def test_unknown_directions_are_named() -> None:
    with pytest.raises(ValueError, match=r"strategy\.directions=newton .* gradient, normalised or rms"):
        Directions("newton")
