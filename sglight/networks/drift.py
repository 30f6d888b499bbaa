"""How far states that a reversible network rebuilds are from those that it has had."""

from __future__ import annotations

import torch
from torch import Tensor

from sglight.networks.network import Stage
from sglight.networks.segment import Segment

# Of so many samples. A relative error above the limit makes gradients wrong, by more the longer the horizon.
SAMPLES, LIMIT = 4, 1e-2


@torch.no_grad()
def drift(stage: Stage, entered: Tensor) -> Tensor:
    """Largest relative error, over a stage's segments, of the first state as it is rebuilt from the last.

    Steps that are exact inverses of each other are not in floating point: each adds its rounding errors, which the
    inverse of a dynamics that contracts makes larger. Zero without segments.

    Args:
        entered: what the stage begins with ``[B, ...]``; a few samples are looked at.
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
