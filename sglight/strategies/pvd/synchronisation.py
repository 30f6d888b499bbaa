"""Rules that compute the next point from the candidates of all processors.

The convergence theory allows any point that is no worse than the best candidate (Ferris & Mangasarian 1994).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sglight.strategies.pvd.objective import Evaluated, Point, inner


class Synchronised(NamedTuple):
    """The next point.

    Attributes:
        reached: the point with its value.
        weights: p + 1 weights with sum one, with which it is a sum of the present point and the candidates.
        winner: the number of the best candidate.
    """

    reached: Evaluated
    weights: list[float]
    winner: int


class Search(NamedTuple):
    """The objective, as a rule may use it.

    Attributes:
        evaluate: f at a point.
        differentiate: f at a point, and its gradient.
        steps: the largest number of iterations of a search.
    """

    evaluate: Callable[[Point], Evaluated]
    differentiate: Callable[[Point], tuple[float, Point]]
    steps: int = 4


def best(start: Evaluated, candidates: Sequence[Evaluated], search: Search) -> Synchronised:
    """The best candidate."""
    values = [c.value for c in candidates]
    winner = values.index(min(values))
    weights = [0.0] * (len(candidates) + 1)
    weights[winner + 1] = 1.0
    return Synchronised(candidates[winner], weights, winner)


def average(start: Evaluated, candidates: Sequence[Evaluated], search: Search) -> Synchronised:
    """The mean of the candidates if that is no worse than the present point, else the best candidate.

    For an objective that is not convex the mean may be worse than all candidates.
    """
    found = best(start, candidates, search)
    share = [1 / len(candidates)] * len(candidates)
    middle = search.evaluate(combined(start.point, [c.point for c in candidates], share))
    return Synchronised(middle, [0.0, *share], found.winner) if middle.no_worse_than(start) else found


def affine(start: Evaluated, candidates: Sequence[Evaluated], search: Search) -> Synchronised:
    """The best point found in the affine hull of the present point and the candidates.

    It is searched by `Search.steps` iterations of L-BFGS over the weights, from the best candidate on; the result is
    never worse than that.
    """
    found = best(start, candidates, search)
    if found.reached.value >= start.value:
        return found  # no processor has moved, so the hull is a single point
    points = [c.point for c in candidates]
    edges = [[c - x for c, x in zip(point, start.point, strict=True)] for point in points]
    w = torch.tensor(found.weights[1:], dtype=torch.float64, requires_grad=True)

    def closure() -> float:
        value, gradient = search.differentiate(combined(start.point, points, w.tolist()))
        w.grad = torch.tensor([math.fsum(map(inner, gradient, edge)) for edge in edges], dtype=torch.float64)
        return value

    torch.optim.LBFGS([w], max_iter=search.steps, line_search_fn="strong_wolfe").step(closure)
    weights = w.tolist()
    reached = search.evaluate(combined(start.point, points, weights))
    if not reached.value < found.reached.value:
        return found
    return Synchronised(reached, [1 - math.fsum(weights), *weights], found.winner)


SYNCHRONISATIONS = {"best": best, "average": average, "affine": affine}


def combined(start: Point, points: Sequence[Point], weights: Sequence[float]) -> Point:
    """The combination start + sum_l w_l (x^(l) - start), in which the present point has the weight 1 - sum_l w_l."""

    def block(x: Tensor, *others: Tensor) -> Tensor:
        moved = x
        for w, other in zip(weights, others, strict=True):
            moved = moved + w * (other - x)
        return moved

    return [block(*blocks) for blocks in zip(start, *points, strict=True)]
