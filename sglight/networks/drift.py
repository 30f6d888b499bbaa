"""The error of a reversible backward pass: how far the rebuilt states are from the states of the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from sglight.networks.network import Stage
from sglight.networks.segment import Segment

SAMPLES = 4  # samples of a batch that are checked
LIMIT = 1e-2  # relative error above which gradients are noticeably wrong, the more so the longer the horizon


@torch.no_grad()
def drift(stage: Stage, entered: Tensor) -> Tensor:
    """Largest relative error ||inverse(forward(x)) - x|| / ||x|| over the segments of a stage; a scalar.

    In exact arithmetic it is zero. In floating point each step adds a rounding error, and the inverse of a dynamics
    that contracts amplifies it.

    Args:
        stage: of a reversible network.
        entered: the input of the stage, ``[B, ...]``; only the first few samples are used.
    """
    entered = entered[:SAMPLES]
    state = stage.open(entered) if stage.is_first else entered
    worst = torch.zeros((), device=state.device)
    for part in stage.flow():
        out = part(state)
        if isinstance(part, Segment):
            error = (part.inverse(out) - state).float().norm() / state.float().norm()
            worst = torch.maximum(worst, error)
        state = out
    return worst
