"""The private parts of torch that sglight depends on are still there, and do what their public counterparts do."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.nn.functional as F
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.optim.lr_scheduler import LambdaLR

from sglight.compat import torch as compat


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_transforms_and_exports_are_noticed() -> None:
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(compat.is_transformed())
        return x.sum()

    function(random(3))
    torch.func.grad(function)(random(3))
    assert seen == [False, True]


def test_backward_passes_are_those_of_autograd() -> None:
    p, g = random(5).requires_grad_(), random(5)
    for function, backward in ((torch.tanh, compat.tanh_backward), (torch.relu, compat.relu_backward)):
        (expected,) = torch.autograd.grad(function(p), p, g)
        torch.testing.assert_close(backward(g, function(p).detach()), expected)


def test_backward_of_a_convolution_is_that_of_autograd() -> None:
    x, weight, bias = random(2, 3, 5, 5), random(4, 3, 3, 3), random(4)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = F.conv2d(*leaves, padding=1)
    grad = random(*out.shape)
    expected = torch.autograd.grad(out, leaves, grad)
    torch.testing.assert_close(compat.conv2d_backward(grad, x.detach(), weight.detach(), 1), expected)


def test_operations_on_lists_are_those_on_each() -> None:
    tensors, others = [random(2), random(3, 1)], [random(2) + 1, random(3, 1) + 2]
    expected = [2 * a + b for a, b in zip(tensors, others, strict=True)]
    compat.scale_(tensors, 2)
    compat.add_(tensors, others)
    torch.testing.assert_close(tensors, expected)
    compat.copy_(tensors, others)
    torch.testing.assert_close(tensors, others)


def test_a_scheduler_tells_the_rates_that_it_is_told() -> None:
    optimizer = torch.optim.SGD([random(1)], lr=1.0)
    scheduler = LambdaLR(optimizer, lambda _: 1.0)
    optimizer.param_groups[0]["lr"] = 0.25
    compat.remember_rates(scheduler, optimizer)
    assert scheduler.get_last_lr() == [0.25]


def test_a_gloo_group_works_on_the_loopback_interface() -> None:
    group = compat.loopback_gloo(HashStore(), 0, 1, timedelta(seconds=5))
    value = torch.ones(2)
    group.allreduce([value]).wait()
    assert value.tolist() == [1.0, 1.0]
