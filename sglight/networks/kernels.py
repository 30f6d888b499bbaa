"""The linear map of a step, dense or convolutional: applied, turned into its adjoint, differentiated by hand.

All weights are stacked over time: ``[N, C, C]`` or ``[N, C, C, k, k]``.
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
    """Where the records of a backward pass go."""

    def append(self, record: Record, /) -> None: ...


class Kernel(Protocol):
    """What a segment needs of its linear map.

    Attributes:
        frugal: the same map, whose records hold gradients only and not the states they come from.
    """

    @property
    def frugal(self) -> Kernel: ...

    def weight_shape(self, channels: int, size: int) -> tuple[int, ...]:
        """Shape of one step's weight."""
        ...

    def adjoint(self, weight: Tensor) -> Tensor:
        """The stack of weights whose map is the adjoint of ``weight``'s."""
        ...

    def identity(self, weight: Tensor) -> Tensor:
        """One step's weight of the identity map, like ``weight``."""
        ...

    def layout(self, state: Tensor) -> Tensor:
        """``state`` in memory as a new tensor would be, in the order in which this kernel is fastest."""
        ...

    def align(self, weight: Tensor) -> Tensor:
        """The stack of weights with each step's in memory as products want it, whatever the steps before it."""
        ...

    def operator(self, weight: Tensor) -> Tensor:
        """Weights, one step's or a stack, in the form that `apply` takes."""
        ...

    def biases(self, bias: Tensor, x: Tensor, count: int) -> Sequence[Sequence[Tensor]]:
        """``count`` times one bias a step, for `apply` to write its result for states like ``x`` into if it wants."""
        ...

    def apply(self, x: Tensor, operator: Tensor, bias: Tensor | None) -> Tensor:
        """K x + b for one step."""
        ...

    def pullback(self, into: Tensor | None, scale: float, grad: Tensor, x: Tensor, weight: Tensor) -> Any:
        """(into + scale * K^T grad, record for `collect`), without ``into`` K^T grad; ``into`` is overwritten."""
        ...

    def ledger(self, weights: Sequence[Tensor]) -> Ledger:
        """An empty ledger for the records of all steps, last step first."""
        ...

    def collect(self, records: Any, scale: float) -> tuple[Tensor, Tensor]:
        """Gradients of the stacked weights and biases from a full ledger, times ``scale``."""
        ...


def own(x: Tensor, strides: tuple[int, ...], order: torch.memory_format) -> Tensor:
    """``x`` if it lies in memory as a new tensor with these strides would, else a copy that does.

    Products round by where their operands begin and how they lie. States and gradients come to a segment from
    the step before or from another stage, which must not be seen in the result.
    """
    if is_transformed():
        return x
    return x if x.stride() == strides and x.storage_offset() == 0 else x.clone(memory_format=order)


def arranged(x: Tensor, layout: Callable[[Tensor], Tensor]) -> Tensor:
    """``layout(x)``, and the gradient is laid out alike on its way back."""
    recorded = x.requires_grad and torch.is_grad_enabled() and not is_transformed()
    return _Arranged.apply(x, layout) if recorded else layout(x)


class _Arranged(torch.autograd.Function):
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
    """Images ``[B, C, H, W]`` with the channels of a pixel side by side."""
    _, c, h, w = x.shape
    if c == 1 or h * w == 1:
        # Both orders are one, and PyTorch's operations then give new tensors the ordinary strides.
        return own(x, (c * h * w, h * w, w, 1), torch.contiguous_format)
    return own(x, (h * w * c, 1, w * c, c), torch.channels_last)


LINE = 64


def on_lines(stack: Tensor) -> Tensor:
    """``stack`` with each entry at a multiple of 64 bytes, where new tensors begin."""
    size = math.prod(stack.shape[1:])
    spare = -size % (LINE // stack.element_size())
    return F.pad(stack.flatten(1), (0, spare))[:, :size].unflatten(1, stack.shape[1:]) if spare else stack


class Dense:
    """y -> K y on ``[B, C]``."""

    @property
    def frugal(self) -> Kernel:
        return _FRUGAL_DENSE

    def weight_shape(self, channels: int, size: int) -> tuple[int, ...]:
        return channels, channels

    def adjoint(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2)

    def identity(self, weight: Tensor) -> Tensor:
        return torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)

    def layout(self, state: Tensor) -> Tensor:
        return own(state, (state.shape[1], 1), torch.contiguous_format)

    def align(self, weight: Tensor) -> Tensor:
        return on_lines(weight)

    def operator(self, weight: Tensor) -> Tensor:
        return weight.mT

    def biases(self, bias: Tensor, x: Tensor, count: int) -> Sequence[Sequence[Tensor]]:
        steps, room = len(bias), bias.new_empty(count, len(bias), *x.shape)
        rows = on_lines(room.copy_(bias[:, None]).flatten(0, 1)).unbind(0)
        return [rows[i * steps : (i + 1) * steps] for i in range(count)]

    def apply(self, x: Tensor, operator: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype != operator.dtype:
            x = x.to(operator.dtype)
        if bias is None:
            return torch.mm(x, operator)
        return bias.addmm_(x, operator) if bias.ndim == 2 else torch.addmm(bias, x, operator)

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

    def ledger(self, weights: Sequence[Tensor]) -> Ledger:
        return []

    def collect(self, records: Any, scale: float) -> tuple[Tensor, Tensor]:
        grads = torch.stack([grad for grad, _ in reversed(records)])
        biases = grads.sum(1).mul_(scale)
        if grads.shape[2] % 2:
            # Batched products of small odd matrices round by their place in the batch, so not by the batch.
            weights = torch.stack([_product(grad, x) for grad, x in reversed(records)])
        else:
            # One batched product over all steps instead of one small product a step.
            inputs = torch.stack([x for _, x in reversed(records)]).to(grads.dtype)
            weights = torch.bmm(grads.transpose(1, 2), inputs)
        return weights.mul_(scale), biases


def _product(grad: Tensor, x: Tensor) -> Tensor:
    return torch.mm(grad.t(), x.to(grad.dtype))


class FrugalDense(Dense):
    """`Dense` with weight gradients taken step by step: slower for small states, which then can be forgotten."""

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
    """A ledger that puts each step's weight and bias gradient in its place at once, last step first.

    Small tensors that stay, between large ones that go, would fragment the memory.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        weight = weights[0]
        self.weight = weight.new_empty(len(weights), *weight.shape)
        self.bias = weight.new_empty(len(weights), weight.shape[0])
        self._places = list(zip(self.weight.unbind(0), self.bias.unbind(0), strict=True))

    def append(self, record: Record) -> None:
        for place, grad in zip(self._places.pop(), record, strict=True):
            place.copy_(grad)

    def scaled(self, scale: float) -> tuple[Tensor, Tensor]:
        return self.weight.mul_(scale), self.bias.mul_(scale)


class Conv:
    """y -> conv2d(y, K) with zero "same" padding on ``[B, C, H, W]``, odd kernel size."""

    @property
    def frugal(self) -> Kernel:
        return self

    def weight_shape(self, channels: int, size: int) -> tuple[int, ...]:
        return channels, channels, size, size

    def adjoint(self, weight: Tensor) -> Tensor:
        # With stride 1, an odd kernel and zero padding, conv_transpose2d with K is conv2d with these weights.
        return weight.transpose(1, 2).flip(3, 4)

    def identity(self, weight: Tensor) -> Tensor:
        unit = torch.zeros(weight.shape[1:], dtype=weight.dtype, device=weight.device)
        middle = weight.shape[-1] // 2
        unit[:, :, middle, middle] = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return unit

    def layout(self, state: Tensor) -> Tensor:
        return channels_last(state)

    def align(self, weight: Tensor) -> Tensor:
        # Channels last for the whole stack at once; cloned, as `contiguous` leaves dimensions of size 1 as they are.
        last = weight.permute(0, 1, 3, 4, 2).clone(memory_format=torch.contiguous_format)
        return on_lines(last).permute(0, 1, 4, 2, 3)

    def operator(self, weight: Tensor) -> Tensor:
        return weight

    def biases(self, bias: Tensor, x: Tensor, count: int) -> Sequence[Sequence[Tensor]]:
        return [bias.unbind(0)] * count

    def apply(self, x: Tensor, operator: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype != operator.dtype:
            x = x.to(operator.dtype)
        return F.conv2d(channels_last(x), operator, bias, padding=operator.shape[-1] // 2)

    def pullback(
        self, into: Tensor | None, scale: float, grad: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor, Record]:
        pad = weight.shape[-1] // 2
        grad_x, grad_weight, grad_bias = conv2d_backward(grad, x.to(weight.dtype), weight, pad)
        out = grad_x if into is None else into.add_(grad_x.to(into.dtype), alpha=scale)
        return out, (grad_weight, grad_bias)

    def ledger(self, weights: Sequence[Tensor]) -> Stacks:
        return Stacks(weights)

    def collect(self, records: Any, scale: float) -> tuple[Tensor, Tensor]:
        return records.scaled(scale)


_FRUGAL_DENSE = FrugalDense()

KERNELS: dict[str, Kernel] = {"dense": Dense(), "conv": Conv()}
