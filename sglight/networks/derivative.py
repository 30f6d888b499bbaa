"""A clear error for second derivatives through a hand-written backward pass, which gives first derivatives only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

Backward = Callable[..., Any]


def first_derivative(backward: Backward) -> Backward:
    """Decorator for the ``backward`` of an autograd function: differentiating its result raises a helpful error.

    torch's `once_differentiable` does not say what to do instead, and misses inputs that need no gradient themselves.

    Raises:
        RuntimeError: when the gradients that ``backward`` returned are differentiated.
    """

    @wraps(backward)
    def recorded(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # create_graph=False: nobody can differentiate the result
            return found
        tensors = [each.detach().requires_grad_() for each in found if each is not None]
        refused = iter(_Refused.apply(*tensors))
        return tuple(None if each is None else next(refused) for each in found)

    return recorded


class _Refused(torch.autograd.Function):
    """The identity; its backward pass raises."""

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
