"""Whether a map is faster in bf16 than in float32 on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

# Multiplications of a map on a batch from which on it is, and what it costs to call the library does not outweigh.
WORK_FOR_BF16 = 1 << 23


@cache
def has_bf16_units() -> bool:
    """Whether the processor multiplies in bf16; others emulate it, which is slower than float32."""
    return any("bf16" in name and bool(has) for name, has in torch.cpu.get_capabilities().items())


def autocast_where_faster(state: Tensor, weight: Tensor) -> AbstractContextManager[object]:
    """Ends autocast on the CPU if steps with ``weight [N, ...]`` on ``state [B, ...]`` are no faster by it."""
    if state.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nullcontext()
    pixels = state.shape[0] * state.shape[2:].numel()
    faster = has_bf16_units() and pixels * weight.shape[1:].numel() >= WORK_FOR_BF16
    return nullcontext() if faster else torch.autocast("cpu", enabled=False)
