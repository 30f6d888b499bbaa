"""The directions along which a processor moves the blocks of other processors."""

from __future__ import annotations

import torch

from sglight.strategies.pvd.objective import Point

DIRECTIONS = ("gradient", "normalised", "rms")
MEMORY, FLOOR = 0.9, 1e-8  # of the running squares, as in Adam


class Directions:
    """Computes a descent direction for each block from the gradient g at the beginning of an iteration.

    Args:
        kind: ``gradient``: d = -g. ``normalised``: d_j = -g_j / ||g_j||, so that m_j is a distance like the
            coordinates of x_l. ``rms``: d = -g / (sqrt(v) + 1e-8) for each entry, where v is the running mean of g^2
            over the iterations (bias-corrected), so that m_j counts steps like those of Adam.

    Attributes:
        squares: the running mean of g^2 for each block; empty at first.
        count: of how many gradients.

    Raises:
        ValueError: for another kind.

    >>> Directions("normalised")([torch.tensor([3.0, 4.0])])
    [tensor([-0.6000, -0.8000])]
    """

    def __init__(self, kind: str) -> None:
        if kind not in DIRECTIONS:
            raise ValueError(
                f"strategy.directions={kind} is unknown; choose {', '.join(DIRECTIONS[:-1])} or {DIRECTIONS[-1]}"
            )
        self.kind = kind
        self.squares: Point = []
        self.count = 0

    def __call__(self, gradient: Point) -> Point:
        """The directions at a point with this gradient."""
        match self.kind:
            case "gradient":
                return [-g for g in gradient]
            case "normalised":
                return [-g / g.norm().clamp_min(torch.finfo(g.dtype).tiny) for g in gradient]
            case _:
                return self._rms(gradient)

    def _rms(self, gradient: Point) -> Point:
        before = self.squares or [torch.zeros_like(g) for g in gradient]
        self.squares = [
            MEMORY * v.to(g) + (1 - MEMORY) * g.square() for v, g in zip(before, gradient, strict=True)
        ]
        self.count += 1
        unbiased = 1 - MEMORY**self.count
        return [-g / ((v / unbiased).sqrt() + FLOOR) for g, v in zip(gradient, self.squares, strict=True)]
