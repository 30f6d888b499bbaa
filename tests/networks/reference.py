"""The networks' equations once more, as plain loops that share no code with the package."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


def K(weight: Tensor, y: Tensor) -> Tensor:  # noqa: N802
    return y @ weight.T if weight.ndim == 2 else F.conv2d(y, weight, padding=weight.shape[-1] // 2)


def Kt(weight: Tensor, y: Tensor) -> Tensor:  # noqa: N802
    return y @ weight if weight.ndim == 2 else F.conv_transpose2d(y, weight, padding=weight.shape[-1] // 2)


def flow(
    dynamics: str,
    state: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    h: float,
    activation: str = "tanh",
    gamma: float = 0.0,
    norms: Sequence[Callable[[Tensor, int], Tensor]] | None = None,
) -> Tensor:
    """The state after all steps; ``norms[j](p, i)`` normalises the i-th pre-activation of step j."""
    act = ACTIVATIONS[activation]
    for j, (w, b) in enumerate(zip(weights, biases, strict=True)):
        b = b if w.ndim == 2 else b[:, None, None]

        def s(p: Tensor, i: int = 0, j: int = j, b: Tensor = b) -> Tensor:
            return act(p + b if norms is None else norms[j](p + b, i))

        if dynamics == "euler":
            state = state + h * s(K(w, state))
        elif dynamics == "antisymmetric":
            state = state + h * s(0.5 * (K(w, state) - Kt(w, state) - gamma * state))
        elif dynamics == "hamiltonian":
            y, z = state.chunk(2, 1)
            z = z - h * s(Kt(w, y), 0)
            y = y + h * s(K(w, z), 1)
            state = torch.cat([y, z], 1)
        else:
            y, y_prev = state.chunk(2, 1)
            state = torch.cat([2 * y - y_prev + h**2 * s(-Kt(w, K(w, y))), y], 1)
    return state
