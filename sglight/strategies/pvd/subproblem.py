"""What each processor of parallel variable distribution minimises.

Processor l has its own block x_l, and a scalar m_j for each foreign block j (Ferris & Mangasarian 1994):

    min over x_l, m of f(x_l, x_j + m_j d_j for j != l),      df/dm_j = <df/dx_j, d_j>

The scalars are the forget-me-not terms: a processor that could not move the foreign blocks at all would take them for
constants, which they are not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sglight.strategies.pvd.objective import Point


class Subproblem:
    """Processor ``own``'s problem: its variables, the point that they stand for, and their gradient.

    Args:
        own: l. x: any point, for shapes and kind of the blocks.
        forget_me_not: whether there are scalars; without, the foreign blocks stay.
    """

    def __init__(self, own: int, x: Point, forget_me_not: bool) -> None:
        self.own = own
        self.foreign = [j for j in range(len(x)) if j != own] if forget_me_not else []
        self.block = nn.Parameter(x[own].clone())
        self.scalars = nn.Parameter(x[own].new_zeros(len(self.foreign)))
        self._x = self._directions = x

    @property
    def variables(self) -> list[nn.Parameter]:
        """What the local solver moves."""
        return [self.block, self.scalars] if self.foreign else [self.block]

    @property
    def wanted(self) -> list[int]:
        """The blocks whose gradient `pull_back` takes, in its order."""
        return [self.own, *self.foreign]

    def begin(self, x: Point, directions: Point) -> None:
        """Start anew, from x."""
        self._x, self._directions = x, directions
        self.move(x[self.own], torch.zeros_like(self.scalars))

    @torch.no_grad()
    def move(self, block: Tensor, scalars: Tensor) -> None:
        """Give the variables these values."""
        self.block.copy_(block)
        self.scalars.copy_(scalars)

    def point(self) -> Point:
        """The value of all variables."""
        return candidate(self._x, self._directions, self.own, self.block.detach(), self.scalars.detach())

    def pull_back(self, gradient: Sequence[Tensor]) -> None:
        """Give the variables their gradients, from those of f with respect to the ``wanted`` blocks."""
        own, *foreign = gradient
        self.block.grad = own
        if self.foreign:
            pairs = zip(foreign, self.foreign, strict=True)
            self.scalars.grad = torch.stack([torch.dot(g, self._directions[j]) for g, j in pairs])


def candidate(x: Point, directions: Point, own: int, block: Tensor, scalars: Tensor) -> Point:
    """x with block ``own`` replaced, and each other block j moved to x_j + m_j d_j if there are scalars."""
    point = list(x)
    foreign = [j for j in range(len(x)) if j != own]
    for j, m in zip(foreign, scalars, strict=False):
        point[j] = x[j] + m * directions[j]
    point[own] = block.clone()
    return point
