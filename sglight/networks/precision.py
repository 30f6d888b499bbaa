"""Where bf16 is used on the CPU: only if it is faster than float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

# Multiplications of a linear map on a batch from which on bf16 outweighs the cost of calling its library.
WORK_FOR_BF16 = 1 << 23


@cache
def has_bf16_units() -> bool:
    """Whether the processor can multiply in bf16; others emulate it, which is slower than float32."""
    return any("bf16" in name and bool(has) for name, has in torch.cpu.get_capabilities().items())


def autocast_where_faster(state: Tensor, weight: Tensor) -> AbstractContextManager[object]:
    """Turns autocast off, on the CPU, where bf16 would not be faster; a context manager.

    Args:
        state: ``[B, C, ...]``.
        weight: ``[N, ...]``, of the steps that are applied to it.
    """
    if state.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    pixels = state.shape[0] * state.shape[2:].numel()
    faster = has_bf16_units() and pixels * weight.shape[1:].numel() >= WORK_FOR_BF16
    return nullcontext() if faster else torch.autocast("cpu", enabled=False)
