"""Batch normalisation over the samples of one worker or of all replicas of a stage (Ioffe & Szegedy 2015)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from sglight.link import Replicas

MOMENTUM, EPS = 0.1, 1e-5  # PyTorch's


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    training: bool,
    replicas: Replicas,
) -> Tensor:
    """Normalises each channel, as `torch.nn.functional.batch_norm`; all replicas must call it.

    Args:
        x: ``[B, C, ...]``, the samples of this replica.
        running_mean: ``[C]``, updated in training.
        running_var: ``[C]``, updated in training.
        weight: ``[C]``.
        bias: ``[C]``.
        training: whether to use the statistics of the samples, not the running ones.
        replicas: the workers over whose samples the statistics are taken.
    """
    if training and replicas.size > 1:
        y: Tensor = _Shared.apply(x, running_mean, running_var, weight, bias, replicas)
        return y
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS)


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the statistics of the samples of all ``replicas``."""

    replicas = Replicas()

    @override
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.replicas.size == 1:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, self.replicas)


class _Shared(torch.autograd.Function):
    """The autograd node of `batch_norm` over several replicas.

    With the mean m and the variance v of the n values of a channel at all replicas, and z = (x - m) / sqrt(v + eps):

        y = w z + b,    dL/dx = w (g - (sum g + z sum g z) / n) / sqrt(v + eps),    g = dL/dy

    The sums are taken over all replicas. The gradients of w and b are only this replica's part, like those of all
    parameters: `begin_sum` in `sglight.strategies.replication` adds them up.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        replicas: Replicas,
    ) -> Tensor:
        ctx.replicas, ctx.dims = replicas, [0, *range(2, x.ndim)]
        wide, channels = x.to(weight.dtype), x.shape[1]
        sums = [each.sum(ctx.dims, dtype=torch.float64) for each in (wide, wide.square())]
        # One message for both sums. In float64 the difference of squares is as accurate as float32 needs.
        total = replicas.sum(torch.cat([*sums, sums[0].new_tensor([x.numel() / channels])]))
        ctx.count = float(total[-1])
        mean = total[:channels] / ctx.count
        var = (total[channels:-1] / ctx.count - mean.square()).clamp_min(0)
        running_mean.lerp_(mean.to(running_mean.dtype), MOMENTUM)
        running_var.lerp_((var * ctx.count / (ctx.count - 1)).to(running_var.dtype), MOMENTUM)
        scale = (var + EPS).rsqrt().to(weight.dtype)
        z = (wide - _column(mean.to(weight.dtype), x)) * _column(scale, x)
        ctx.save_for_backward(z, weight, scale)
        return (z * _column(weight, x) + _column(bias, x)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, scale = ctx.saved_tensors
        g = gradients[0].to(weight.dtype)
        own = torch.cat([g.sum(ctx.dims), (g * z).sum(ctx.dims)])
        bias_gradient, weight_gradient = own.chunk(2)
        sum_g, sum_gz = (_column(part, z) / ctx.count for part in ctx.replicas.sum(own.clone()).chunk(2))
        x_gradient = _column(weight * scale, z) * (g - sum_g - z * sum_gz)
        return x_gradient.to(gradients[0].dtype), None, None, weight_gradient, bias_gradient, None


def _column(values: Tensor, x: Tensor) -> Tensor:
    """Values ``[C]`` in a shape that broadcasts to that of ``x``."""
    return values.view(-1, *[1] * (x.ndim - 2))
