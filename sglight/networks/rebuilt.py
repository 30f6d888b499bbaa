"""Reversible backward pass for any step that autograd can differentiate: slower than `fused.py`, but general.

Used for steps with group or layer normalisation. Each state is rebuilt from the next by the inverse step, and the
step is then differentiated on its own, so that the memory for activations does not grow with N.
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
    """All N steps; ``parameters`` are stacked over time, N first; ``known``: what comes out, where that is known."""
    return _Rebuilt.apply(step, inverse, known, len(fields), *fields, *parameters)


class _Rebuilt(torch.autograd.Function):
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
        # In place from the start: small tensors that stay, left between large ones that go, fragment the memory.
        stacks = [torch.empty_like(p) for p in parameters]
        device, lower, enabled = ctx.autocast
        for j in reversed(range(len(slices))):
            now = slices[j]
            # In the precision of the forward pass, or another path would be rebuilt.
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
