"""Private parts of torch that we lean on."""

from __future__ import annotations

import torch


def is_transformed() -> bool:
    """Whether this runs under `torch.func` (grad, vmap, jacrev, ...) or is being exported.

    Hand-written backward passes and the order of tensors in memory mean nothing there.
    """
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting()
