"""The linear map of a step, dense or convolutional: applied, turned into its adjoint, differentiated by hand.

All weights are stacked over time: ``[N, C, C]`` or ``[N, C, C, k, k]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Record = tuple[Tensor, Tensor]


class Kernel(Protocol):
    """What a segment needs of its linear map."""

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
        """``state`` in the memory layout in which this kernel is fastest."""
        ...

    def unstack(self, weight: Tensor) -> Sequence[Tensor]:
        """One weight a step, in the layout in which this kernel is fastest."""
        ...

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """K x + b for one step."""
        ...

    def pullback(self, into: Tensor | None, scale: float, grad: Tensor, x: Tensor, weight: Tensor) -> Any:
        """(into + scale * K^T grad, record for `collect`); ``into`` is overwritten."""
        ...

    def collect(self, records: list[Record], scale: float) -> tuple[Tensor, Tensor]:
        """Gradients of the stacked weights and biases from the records, last step first."""
        ...


class Dense:
    """y -> K y on ``[B, C]``."""

    def weight_shape(self, channels: int, size: int) -> tuple[int, ...]:
        return channels, channels

    def adjoint(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2)

    def identity(self, weight: Tensor) -> Tensor:
        return torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)

    def layout(self, state: Tensor) -> Tensor:
        return state.contiguous()

    def unstack(self, weight: Tensor) -> Sequence[Tensor]:
        return weight.unbind(0)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.to(weight.dtype)
        return torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())

    def pullback(
        self, into: Tensor | None, scale: float, grad: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor, Record]:
        if into is None:
            out = torch.mm(grad, weight).mul_(scale)
        elif into.dtype == grad.dtype:
            out = into.addmm_(grad, weight, alpha=scale)
        else:
            out = into.add_(torch.mm(grad, weight), alpha=scale)
        return out, (grad, x)

    def collect(self, records: list[Record], scale: float) -> tuple[Tensor, Tensor]:
        # One batched product over all steps instead of one small product a step.
        grads = torch.stack([grad for grad, _ in reversed(records)])
        inputs = torch.stack([x for _, x in reversed(records)]).to(grads.dtype)
        return torch.bmm(grads.transpose(1, 2), inputs).mul_(scale), grads.sum(1).mul_(scale)


class Conv:
    """y -> conv2d(y, K) with zero "same" padding on ``[B, C, H, W]``, odd kernel size."""

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
        return state.contiguous(memory_format=torch.channels_last)

    def unstack(self, weight: Tensor) -> Sequence[Tensor]:
        # Channels last for the whole stack at once.
        return weight.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3).unbind(0)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x.to(weight.dtype), weight, bias, padding=weight.shape[-1] // 2)

    def pullback(
        self, into: Tensor | None, scale: float, grad: Tensor, x: Tensor, weight: Tensor
    ) -> tuple[Tensor, Record]:
        pad = weight.shape[-1] // 2
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad,
            x.to(weight.dtype),
            weight,
            [weight.shape[0]],
            [1, 1],
            [pad, pad],
            [1, 1],
            False,
            [0, 0],
            1,
            [True, True, True],
        )
        out = grad_x.mul_(scale) if into is None else into.add_(grad_x, alpha=scale)
        return out, (grad_weight, grad_bias)

    def collect(self, records: list[Record], scale: float) -> tuple[Tensor, Tensor]:
        weights = torch.stack([weight for weight, _ in reversed(records)])
        biases = torch.stack([bias for _, bias in reversed(records)])
        return weights.mul_(scale), biases.mul_(scale)


KERNELS: dict[str, Kernel] = {"dense": Dense(), "conv": Conv()}
