"""A reversible backward pass for any invertible step: slower than `fused.py`, but general.

It is used for steps with group or layer normalisation, and for dynamics from outside the package. The backward pass
rebuilds each state from the next by the inverse step and differentiates that step alone, so that the memory for
activations does not grow with N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from sglight.networks.derivative import first_derivative

# (fields, one step's parameters) -> fields
StepFunction = Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, ...]]


def run(
    fields: tuple[Tensor, ...],
    parameters: tuple[Tensor, ...],
    step: StepFunction,
    inverse: StepFunction,
    known: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """All N steps: the fields of a state in, those of the last state out.

    Args:
        fields: of the first state, each ``[B, C, ...]``.
        parameters: each ``[N, ...]``; a step gets one row of each.
        step, inverse: one time step, and its inverse.
        known: the output, if it is already known; then the forward pass computes nothing.
    """
    return _Rebuilt.apply(step, inverse, known, len(fields), *fields, *parameters)


class _Rebuilt(torch.autograd.Function):
    """The autograd node of `run`."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        step: StepFunction,
        inverse: StepFunction,
        known: tuple[Tensor, ...] | None,
        count: int,
        *tensors: Tensor,
    ) -> Any:
        fields, parameters = tensors[:count], tensors[count:]
        ctx.step, ctx.inverse, ctx.count = step, inverse, count
        if known is not None:
            fields = known
        else:
            for now in zip(*(p.unbind(0) for p in parameters), strict=True):
                fields = step(fields, now)
        # An output must not be an input (a leapfrog's y_prev after no step at all would be).
        out = tuple(field.clone() for field in fields)
        ctx.save_for_backward(*out, *parameters)
        device = out[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return out

    @staticmethod
    @first_derivative
    @override
    def backward(ctx: Any, *grads: Tensor) -> Any:
        fields, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        slices = list(zip(*(p.unbind(0) for p in parameters), strict=True))
        # Allocated at once: small tensors that live on between large ones that are freed would fragment the memory.
        stacks = [torch.empty_like(p) for p in parameters]
        device, lower, enabled = ctx.autocast
        for j in reversed(range(len(slices))):
            now = slices[j]
            # The precision of the forward pass; another one would rebuild other states.
            with torch.autocast(device, lower, enabled):
                fields = ctx.inverse(fields, now)
            leaves = [tensor.detach().requires_grad_() for tensor in (*fields, *now)]
            with torch.enable_grad(), torch.autocast(device, lower, enabled):
                out = ctx.step(tuple(leaves[: ctx.count]), tuple(leaves[ctx.count :]))
            pulled = torch.autograd.grad(out, leaves, grads, materialize_grads=True)
            grads = pulled[: ctx.count]
            for stack, grad in zip(stacks, pulled[ctx.count :], strict=True):
                stack[j].copy_(grad)
        return None, None, None, None, *grads, *stacks
