"""Jacobians of maps between batches of states, and their singular values and eigenvalues.

A map takes states ``[B, ...]`` to states ``[B, ...]``, perhaps of another shape, and treats each sample by itself; its
Jacobian is one matrix for each sample. Large ones are not formed: their largest singular value is estimated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def push(f: Map, x: Tensor, v: Tensor) -> Tensor:
    """J v: the derivative of f at x in the direction v (forward mode)."""
    with torch.no_grad():
        tangent: Tensor = torch.func.jvp(f, (x,), (v,))[1]
        return tangent


def pull(f: Map, x: Tensor, u: Tensor) -> Tensor:
    """J^T u: the gradient of <f(x), u> at x (reverse mode)."""
    pullback: Any = torch.func.vjp(f, x)[1]
    gradient: Tensor = pullback(u)[0]
    return gradient


def jacobian(f: Map, x: Tensor) -> Tensor:
    """The Jacobian ``[B, D', D]`` of f at states of D values, mapped to D' values; takes the memory of B D states."""
    size = x[0].numel()
    basis = torch.eye(size, dtype=x.dtype, device=x.device).repeat(len(x), 1)
    columns = push(f, x.repeat_interleave(size, 0), basis.view(-1, *x.shape[1:]))
    return columns.reshape(len(x), size, -1).mT


def singular_values(matrices: Tensor) -> Tensor:
    """The singular values of matrices ``[B, D', D]``, largest first; NaN for a matrix that is not finite."""
    return _of_finite(torch.linalg.svdvals, matrices)


def spectral_radius(matrices: Tensor) -> Tensor:
    """The largest modulus ``[B]`` of an eigenvalue of matrices ``[B, D, D]``; NaN for a matrix that is not finite."""
    return _of_finite(torch.linalg.eigvals, matrices).abs().amax(1)


def largest_singular_value(f: Map, x: Tensor, iterations: int, generator: torch.Generator) -> Tensor:
    """A lower bound ``[B]`` for the largest singular value of the Jacobian of f at x.

    It is found by Golub-Kahan-Lanczos bidiagonalisation (Golub & Kahan 1965). Each iteration takes one `push` and one
    `pull`; with as many iterations as a state has values the result is exact.

    Args:
        f: the map.
        x: the states ``[B, ...]``.
        iterations: how many.
        generator: on the CPU, draws the first direction.
    """
    left: list[Tensor] = []
    right: list[Tensor] = []
    diagonal: list[Tensor] = []
    above: list[Tensor] = []
    v, _ = _normalised(torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device), [])
    for _ in range(iterations):
        right.append(v)
        u, length = _normalised(push(f, x, v), left)
        left.append(u)
        diagonal.append(length)
        v, length = _normalised(pull(f, x, u), right)
        above.append(length)
    bidiagonal = torch.diag_embed(torch.stack(diagonal, 1))
    if iterations > 1:
        bidiagonal += torch.diag_embed(torch.stack(above[:-1], 1), 1)
    return singular_values(bidiagonal)[:, 0]


def _normalised(x: Tensor, basis: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The part of x orthogonal to ``basis``, as a unit vector, and its norm ``[B]``; both 0 if it is rounding error."""
    rows = x.flatten(1)
    before = rows.norm(dim=1)
    if basis:
        span = torch.stack([b.flatten(1) for b in basis], 1)
        for _ in range(2):  # once is not enough in floating point
            rows = rows - ((span @ rows[..., None]).mT @ span)[:, 0]
    length = rows.norm(dim=1)
    rounding = length <= 10 * torch.finfo(x.dtype).eps * before
    unit = torch.where(rounding[:, None], 0, rows / length[:, None])
    return unit.view_as(x), torch.where(rounding, 0, length)


def _of_finite(function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """``function(matrices)``, with NaN for a matrix with an entry that is not finite, which LAPACK would refuse."""
    finite = matrices.isfinite().flatten(1).all(1)
    values = function(torch.where(finite[:, None, None], matrices, 0))
    return torch.where(finite[:, None], values, torch.nan)
