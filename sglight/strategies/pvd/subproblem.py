"""The subproblem that each processor of parallel variable distribution minimises.

Processor l has its own block x_l, and a scalar m_j for each block j of another processor (Ferris & Mangasarian 1994):

    min over x_l, m of f(x_l, x_j + m_j d_j for j != l),      df/dm_j = <df/dx_j, d_j>

The scalars are the "forget-me-not" terms: with them a processor takes into account that the other blocks will move.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sglight.strategies.pvd.objective import Point


class Subproblem:
    """The subproblem of processor l: its variables, the point that they define, and their gradient.

    Args:
        own: l.
        x: any point, for the shapes and types of the blocks.
        forget_me_not: whether there are scalars; without them the other blocks do not move.

    Attributes:
        foreign: the blocks of other processors that have scalars.
        block, scalars: the variables.
    """

    def __init__(self, own: int, x: Point, forget_me_not: bool) -> None:
        self.own = own
        self.foreign = [j for j in range(len(x)) if j != own] if forget_me_not else []
        self.block = nn.Parameter(x[own].clone())
        self.scalars = nn.Parameter(x[own].new_zeros(len(self.foreign)))
        self._x = self._directions = x

    @property
    def variables(self) -> list[nn.Parameter]:
        """The variables of the local solver."""
        return [self.block, self.scalars] if self.foreign else [self.block]

    @property
    def wanted(self) -> list[int]:
        """The blocks whose gradients `pull_back` needs, in this order."""
        return [self.own, *self.foreign]

    def begin(self, x: Point, directions: Point) -> None:
        """Begin at x, with all scalars 0."""
        self._x, self._directions = x, directions
        self.move(x[self.own], torch.zeros_like(self.scalars))

    @torch.no_grad()
    def move(self, block: Tensor, scalars: Tensor) -> None:
        """Set the values of the variables."""
        self.block.copy_(block)
        self.scalars.copy_(scalars)

    def point(self) -> Point:
        """The point that the variables define."""
        return candidate(self._x, self._directions, self.own, self.block.detach(), self.scalars.detach())

    def pull_back(self, gradient: Sequence[Tensor]) -> None:
        """Set the gradients of the variables, from those of f with respect to the ``wanted`` blocks."""
        own, *foreign = gradient
        self.block.grad = own
        if self.foreign:
            pairs = zip(foreign, self.foreign, strict=True)
            self.scalars.grad = torch.stack([torch.dot(g, self._directions[j]) for g, j in pairs])


def candidate(x: Point, directions: Point, own: int, block: Tensor, scalars: Tensor) -> Point:
    """x with block ``own`` replaced by ``block``, and other blocks j moved to x_j + m_j d_j if there are scalars."""
    point = list(x)
    foreign = [j for j in range(len(x)) if j != own]
    for j, m in zip(foreign, scalars, strict=False):
        point[j] = x[j] + m * directions[j]
    point[own] = block.clone()
    return point
