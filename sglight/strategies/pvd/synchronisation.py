"""How the candidates of all processors become the next point: one that is no worse than the best of them.

Ferris & Mangasarian 1994: any point will do whose value is at most the smallest of the candidates'.
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
        weights: it is the sum of the current point and the candidates with these p + 1 weights, whose sum is one.
        winner: number of the best candidate.
    """

    reached: Evaluated
    weights: list[float]
    winner: int


class Search(NamedTuple):
    """What a rule may ask of the objective.

    Attributes:
        evaluate: a point. differentiate: the value at a point and the gradient. steps: most iterations of a search.
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
    """The mean of the candidates where that is no worse than the current point, otherwise the best candidate.

    Only of a convex objective is the mean's value at most the largest of the candidates'.
    """
    found = best(start, candidates, search)
    share = [1 / len(candidates)] * len(candidates)
    middle = search.evaluate(combined(start.point, [c.point for c in candidates], share))
    return Synchronised(middle, [0.0, *share], found.winner) if middle.no_worse_than(start) else found


def affine(start: Evaluated, candidates: Sequence[Evaluated], search: Search) -> Synchronised:
    """The best point found in the affine hull of the current point and the candidates.

    `Search.steps` iterations of L-BFGS over the weights, begun at the best candidate and never worse than it.
    """
    found = best(start, candidates, search)
    if found.reached.value >= start.value:
        return found  # nobody has moved: the hull is a point
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
    """start + sum_l w_l (x^(l) - start): the combination in which the current point's weight is 1 - sum_l w_l."""

    def block(x: Tensor, *others: Tensor) -> Tensor:
        moved = x
        for w, other in zip(weights, others, strict=True):
            moved = moved + w * (other - x)
        return moved

    return [block(*blocks) for blocks in zip(start, *points, strict=True)]
