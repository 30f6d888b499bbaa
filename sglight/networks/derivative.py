"""Backward passes that are written by hand and cannot be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

Backward = Callable[..., Any]


def first_derivative(backward: Backward) -> Backward:
    """For the ``backward`` of an autograd function: differentiating its results says what to do instead.

    torch's own `once_differentiable` knows no remedy, and lets through what gets no gradient itself.
    """

    @wraps(backward)
    def recorded(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # without create_graph
            return found
        tensors = [each.detach().requires_grad_() for each in found if each is not None]
        refused = iter(_Refused.apply(*tensors))
        return tuple(None if each is None else next(refused) for each in found)

    return recorded


class _Refused(torch.autograd.Function):
    @staticmethod
    @override
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the hand-written backward pass of a segment gives first derivatives only; for second ones call plain() on "
            "the network or stage before the forward pass, or use torch.func"
        )
