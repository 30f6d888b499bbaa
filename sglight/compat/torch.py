"""Private parts of torch that sglight depends on."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.optim import Optimizer

Group = Any  # a torch.distributed.Backend, whose type stubs are incomplete


def is_transformed() -> bool:
    """Whether this code runs under `torch.func` (grad, vmap, jacrev, ...) or is being exported.

    Hand-written backward passes and memory layouts must not be used there.
    """
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting()


def tanh_backward(grad: Tensor, output: Tensor) -> Tensor:
    """grad * (1 - output^2) in one pass, for output = tanh(p)."""
    return torch.ops.aten.tanh_backward(grad, output)


def relu_backward(grad: Tensor, output: Tensor) -> Tensor:
    """grad where output > 0, else 0, in one pass, for output = relu(p)."""
    return torch.ops.aten.threshold_backward(grad, output, 0)


def conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias of ``conv2d(x, weight, bias, padding=padding)``, in one call.

    Args:
        grad: the gradient of the output ``[B, D, H, W]``.
        x: ``[B, C, H, W]``.
        weight: ``[D, C, k, k]``.
        padding: on each side.
    """
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        [weight.shape[0]],
        [1, 1],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        1,
        [True, True, True],
    )


def scale_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply tensors by a number in place, in one call."""
    torch._foreach_mul_(list(tensors), factor)


def add_(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Add tensors to others, one to one, in place, in one call."""
    torch._foreach_add_(list(tensors), list(others))


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors into others, one to one, in one call."""
    torch._foreach_copy_(list(targets), list(sources))


def remember_rates(scheduler: Any, optimizer: Optimizer) -> None:
    """Make `scheduler.get_last_lr` return the present learning rates of ``optimizer``, which other code has set."""
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def loopback_gloo(store: Store, rank: int, size: int, timeout: timedelta) -> Group:
    """A gloo group that listens on 127.0.0.1 only, so that other machines cannot reach its sockets."""
    backend: Any = dist.ProcessGroupGloo
    options = backend._Options()
    options._timeout = timeout
    options._devices = [backend.create_device(hostname="127.0.0.1")]
    return backend(store, rank, size, options)


def nccl(store: Store, rank: int, size: int, timeout: timedelta) -> Group:
    """An NCCL group."""
    backend: Any = dist.ProcessGroupNCCL
    options = backend.Options()
    options._timeout = timeout
    return backend(store, rank, size, options)
