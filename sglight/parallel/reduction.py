"""The reductions over all workers that Lightning uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Reduction = Callable[[Tensor], Tensor]  # [W, ...] -> [...]


def reduction(reduce_op: Any) -> Reduction:
    """A function that reduces the tensors of W workers, ``[W, ...]``, to one of the same type, ``[...]``.

    As in Lightning's own strategies, a mean of integers is rounded towards zero, and a sum of booleans is true if one
    of them is. Sums are computed in float64, or exactly for integers.

    Args:
        reduce_op: ``mean`` or ``avg``, ``sum``, ``max``, ``min``, in any case, or such a `torch.distributed.ReduceOp`.

    Raises:
        ValueError: for any other operation.

    >>> reduction("mean")(torch.tensor([1.0, 2.0]))
    tensor(1.5000)
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
