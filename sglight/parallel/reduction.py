"""One tensor from those of all workers, by the operations that Lightning asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reduction = Callable[[Tensor], Tensor]  # [W, ...] -> [...]


def reduction(reduce_op: Any) -> Reduction:
    """The operation that makes the tensors of W workers, ``[W, ...]``, one: ``[...]``, of the same type.

    As in Lightning's own strategies a mean of integers is rounded towards zero, and a sum of booleans says whether
    one is true. Sums are in float64, or exact for integers.

    Args:
        reduce_op: ``mean`` or ``avg``, ``sum``, ``max``, ``min``, in any case, or such a `torch.distributed.ReduceOp`.

    Raises:
        ValueError: for any other operation.
    """
    kind = getattr(reduce_op, "op", reduce_op)  # `ReduceOp(ReduceOp.SUM)` wraps what `ReduceOp.SUM` is
    name = str(getattr(kind, "name", kind))
    if name.lower() not in REDUCTIONS:
        raise ValueError(f"reduce_op={name} must be one of {', '.join(REDUCTIONS)}")
    reduce = REDUCTIONS[name.lower()]
    return lambda values: reduce(values).to(values.dtype)


def _sum(values: Tensor) -> Tensor:
    return values.sum(0, dtype=torch.float64 if values.is_floating_point() else torch.int64)


def _mean(values: Tensor) -> Tensor:
    return _sum(values).double() / len(values)


def _max(values: Tensor) -> Tensor:
    return values.amax(0)


def _min(values: Tensor) -> Tensor:
    return values.amin(0)


REDUCTIONS: dict[str, Reduction] = {"mean": _mean, "avg": _mean, "sum": _sum, "max": _max, "min": _min}
