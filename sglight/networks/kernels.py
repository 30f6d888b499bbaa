"""The linear map K of a time step, dense or convolutional, with its adjoint and its hand-written derivative.

All weights are stacked over time: ``[N, C, C]`` (dense) or ``[N, C, C, k, k]`` (convolution).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from sglight.compat.torch import conv2d_backward, is_transformed

Record = tuple[Tensor, Tensor]


class Ledger(Protocol):
    """Collects one record a step during the backward pass, from which `Kernel.collect` makes the gradients."""

    def append(self, record: Record, /) -> None:
        """Adds the record of the next step; the last step of the segment comes first."""
        ...


class Kernel(Protocol):
    """A kind of linear map: how it is stored, applied and differentiated."""

    @property
    def frugal(self) -> Kernel:
        """The same map computed with less memory: its records hold gradients, not the states they came from."""
        ...

    def weight_shape(self, channels: int, size: int) -> tuple[int, ...]:
        """The shape of the weight of one step."""
        ...

    def adjoint(self, weight: Tensor) -> Tensor:
        """The stack of weights of the adjoint maps K^T."""
        ...

    def identity(self, weight: Tensor) -> Tensor:
        """The weight of the identity map for one step, with the shape, type and device of ``weight[0]``."""
        ...

    def layout(self, state: Tensor) -> Tensor:
        """``state`` in the memory order in which this kernel is fastest, laid out as in a new tensor."""
        ...

    def align(self, weight: Tensor) -> Tensor:
        """The stack with the weight of each step aligned in memory, so that results do not depend on its place."""
        ...

    def operator(self, weight: Tensor) -> Tensor:
        """The weight of one step, or a stack of them, in the form that `apply` takes."""
        ...

    def biases(self, bias: Tensor, x: Tensor, count: int) -> Sequence[Sequence[Tensor]]:
        """``count`` lists of one bias a step. `apply` may overwrite them with its result for a state like ``x``."""
        ...

    def apply(self, x: Tensor, operator: Tensor, bias: Tensor | None) -> Tensor:
        """K x + b for one step."""
        ...

    def pullback(self, into: Tensor | None, scale: float, grad: Tensor, x: Tensor, weight: Tensor) -> Any:
        """The gradient with respect to x of one step, and the step's record for `collect`.

        The gradient is into + scale * K^T grad, and overwrites ``into``; it is K^T grad if ``into`` is None.
        """
        ...

    def ledger(self, weights: Sequence[Tensor]) -> Ledger:
        """An empty ledger for as many steps as there are weights."""
        ...

    def collect(self, records: Any, scale: float) -> tuple[Tensor, Tensor]:
        """The gradients of the stacked weights and biases from a full ledger, times ``scale``."""
        ...


def own(x: Tensor, strides: tuple[int, ...], order: torch.memory_format) -> Tensor:
    """``x`` laid out in memory as a new tensor with these strides: ``x`` itself if it is, else a copy.

    How a matrix product rounds depends on the layout of its operands. A state may come from the step before or from
    another process; the result must be the same, bit for bit.
    """
    if is_transformed():
        return x
    return x if x.stride() == strides and x.storage_offset() == 0 else x.clone(memory_format=order)


def arranged(x: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
    """``layout(x)``, whose backward pass applies ``layout`` to the gradient as well."""
    recorded = x.requires_grad and torch.is_grad_enabled() and not is_transformed()
    return _Arranged.apply(x, layout) if recorded else layout(x)


class _Arranged(torch.autograd.Function):
    """The autograd node of `arranged`."""

    @staticmethod
    @override
    def forward(ctx: Any, x: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.layout = layout
        return layout(x)

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.layout(grad), None


def channels_last(x: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` in PyTorch's channels-last memory order."""
    _, c, h, w = x.shape
    if c == 1 or h * w == 1:
        # Both orders are the same, and PyTorch's operations then give new tensors the ordinary strides.
        return own(x, (c * h * w, h * w, w, 1), torch.contiguous_format)
    return own(x, (h * w * c, 1, w * c, c), torch.channels_last)


CACHE_LINE = 64  # bytes


def on_cache_lines(stack: Tensor) -> Tensor:
    """``stack`` with each ``stack[j]`` beginning at a multiple of 64 bytes, as new tensors do."""
    size = math.prod(stack.shape[1:])
    spare = -size % (CACHE_LINE // stack.element_size())
    return F.pad(stack.flatten(1), (0, spare))[:, :size].unflatten(1, stack.shape[1:]) if spare else stack


class Dense(Kernel):
    """y -> K y on states ``[B, C]``."""

    @property
    @override
    def frugal(self) -> Kernel:
        return _FRUGAL_DENSE

    @override
    def weight_shape(self, channels: int, size: int) -> tuple[int, ...]:
        return channels, channels

    @override
    def adjoint(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2)

    @override
    def identity(self, weight: Tensor) -> Tensor:
        return torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)

    @override
    def layout(self, state: Tensor) -> Tensor:
        return own(state, (state.shape[1], 1), torch.contiguous_format)

    @override
    def align(self, weight: Tensor) -> Tensor:
        return on_cache_lines(weight)

    @override
    def operator(self, weight: Tensor) -> Tensor:
        return weight.mT

    @override
    def biases(self, bias: Tensor, x: Tensor, count: int) -> Sequence[Sequence[Tensor]]:
        steps, room = len(bias), bias.new_empty(count, len(bias), *x.shape)
        rows = on_cache_lines(room.copy_(bias[:, None]).flatten(0, 1)).unbind(0)
        return [rows[i * steps : (i + 1) * steps] for i in range(count)]

    @override
    def apply(self, x: Tensor, operator: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype != operator.dtype:
            x = x.to(operator.dtype)
        if bias is None:
            return torch.mm(x, operator)
        return bias.addmm_(x, operator) if bias.ndim == 2 else torch.addmm(bias, x, operator)

    @override
    def pullback(
        self, into: Tensor | None, scale: float, grad: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor, Record]:
        if into is None:
            out = torch.mm(grad, weight)
        elif into.dtype == grad.dtype:
            out = into.addmm_(grad, weight, alpha=scale)
        else:
            out = into.add_(torch.mm(grad, weight).to(into.dtype), alpha=scale)
        return out, (grad, x)

    @override
    def ledger(self, weights: Sequence[Tensor]) -> Ledger:
        return []

    @override
    def collect(self, records: Any, scale: float) -> tuple[Tensor, Tensor]:
        grads = torch.stack([grad for grad, _ in reversed(records)])
        biases = grads.sum(1).mul_(scale)
        if grads.shape[2] % 2:
            # In a batched product of small odd matrices, rounding depends on the place in the batch.
            weights = torch.stack([_product(grad, x) for grad, x in reversed(records)])
        else:
            # One batched product over all steps instead of one small product a step.
            inputs = torch.stack([x for _, x in reversed(records)]).to(grads.dtype)
            weights = torch.bmm(grads.transpose(1, 2), inputs)
        return weights.mul_(scale), biases


def _product(grad: Tensor, x: Tensor) -> Tensor:
    return torch.mm(grad.t(), x.to(grad.dtype))


class FrugalDense(Dense):
    """`Dense` with the weight gradient of each step computed at once, so that its states can be freed."""

    @override
    def pullback(
        self, into: Tensor | None, scale: float, grad: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor, Record]:
        out, _ = super().pullback(into, scale, grad, x, weight)
        return out, (_product(grad, x), grad.sum(0))

    @override
    def ledger(self, weights: Sequence[Tensor]) -> Stacks:
        return Stacks(weights)

    @override
    def collect(self, records: Any, scale: float) -> tuple[Tensor, Tensor]:
        return records.scaled(scale)


class Stacks:
    """A ledger that writes the gradients of each step straight into the stacked gradients, last step first.

    Separate small tensors that live on between large ones that are freed would fragment the memory.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        weight = weights[0]
        self.weight = weight.new_empty(len(weights), *weight.shape)
        self.bias = weight.new_empty(len(weights), weight.shape[0])
        self._places = list(zip(self.weight.unbind(0), self.bias.unbind(0), strict=True))

    def append(self, record: Record) -> None:
        """Copies the weight and bias gradients of the next step, counted from the last, to their places."""
        for place, grad in zip(self._places.pop(), record, strict=True):
            place.copy_(grad)

    def scaled(self, scale: float) -> tuple[Tensor, Tensor]:
        """The stacked gradients of weights and biases times ``scale``; overwrites them."""
        return self.weight.mul_(scale), self.bias.mul_(scale)


class Conv(Kernel):
    """y -> conv2d(y, K) on states ``[B, C, H, W]``, with an odd kernel size and zero padding that keeps H and W."""

    @property
    @override
    def frugal(self) -> Kernel:
        return self

    @override
    def weight_shape(self, channels: int, size: int) -> tuple[int, ...]:
        return channels, channels, size, size

    @override
    def adjoint(self, weight: Tensor) -> Tensor:
        # With stride 1, an odd kernel and zero padding, conv_transpose2d with K is conv2d with these weights.
        return weight.transpose(1, 2).flip(3, 4)

    @override
    def identity(self, weight: Tensor) -> Tensor:
        unit = torch.zeros(weight.shape[1:], dtype=weight.dtype, device=weight.device)
        middle = weight.shape[-1] // 2
        unit[:, :, middle, middle] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return unit

    @override
    def layout(self, state: Tensor) -> Tensor:
        return channels_last(state)

    @override
    def align(self, weight: Tensor) -> Tensor:
        # Channels last for the whole stack. `clone`, because `contiguous` may keep odd strides of dimensions of size 1.
        last = weight.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format)
        return on_cache_lines(last).permute(0, 1, 4, 2, 3)

    @override
    def operator(self, weight: Tensor) -> Tensor:
        return weight

    @override
    def biases(self, bias: Tensor, x: Tensor, count: int) -> Sequence[Sequence[Tensor]]:
        return [bias.unbind(0)] * count

    @override
    def apply(self, x: Tensor, operator: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype != operator.dtype:
            x = x.to(operator.dtype)
        return F.conv2d(channels_last(x), operator, bias, padding=operator.shape[-1] // 2)

    @override
    def pullback(
        self, into: Tensor | None, scale: float, grad: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor, Record]:
        pad = weight.shape[-1] // 2
        grad_x, grad_weight, grad_bias = conv2d_backward(grad, x.to(weight.dtype), weight, pad)
        out = grad_x if into is None else into.add_(grad_x.to(into.dtype), alpha=scale)
        return out, (grad_weight, grad_bias)

    @override
    def ledger(self, weights: Sequence[Tensor]) -> Stacks:
        return Stacks(weights)

    @override
    def collect(self, records: Any, scale: float) -> tuple[Tensor, Tensor]:
        return records.scaled(scale)


_FRUGAL_DENSE = FrugalDense()

KERNELS: dict[str, Kernel] = {"dense": Dense(), "conv": Conv()}
