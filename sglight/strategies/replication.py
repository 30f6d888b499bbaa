"""Keeps the replicas of a stage the same: sums of their gradients, and means of their running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sglight.gradients import GradientSource
from sglight.link import Replicas

# Buffers of batch normalisation, which each replica updates with its own samples.
STATISTICS = ("running_mean", "running_var")
NAME = "strategy.estimator.name"


def begin_sum(parameters: Iterable[nn.Parameter], replicas: Replicas) -> Callable[[], None]:
    """Begin to sum the gradients of parameters over the replicas.

    All gradients are sent as one tensor. It is the same for a stage in every placement, and so are the rounding errors
    of its sums.

    Returns:
        a function that waits for the sums and makes them the gradients of the parameters.
    """
    trained = [p for p in parameters if p.requires_grad]
    flat = torch.cat([_gradient(p).flatten() for p in trained])
    wait = replicas.begin_sum(flat)

    def finish() -> None:
        wait()
        for p, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p)

    return finish


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@torch.no_grad()
def average_statistics(stages: nn.Module, replicas: Replicas) -> None:
    """Give all replicas the mean of their running statistics.

    Running statistics are moving averages, which are linear in what they average. So it does not matter how often this
    is done.
    """
    moving = [b for name, b in stages.named_buffers() if name.rpartition(".")[2] in STATISTICS]
    if replicas.size == 1 or not moving:
        return
    flat = replicas.sum(torch.cat([b.flatten() for b in moving])) / replicas.size
    for buffer, part in zip(moving, flat.split([b.numel() for b in moving]), strict=True):
        buffer.copy_(part.view_as(buffer))


def check_estimators(source: GradientSource, replicas: int) -> None:
    """Refuse estimators whose replicas would become different, because each learns from its own part of a batch only.

    Raises:
        ValueError: about ``trainer.replicas``.
    """
    if replicas > 1 and source.has_estimators and not source.learns_together:
        raise ValueError(
            f"trainer.replicas={replicas} does not go with {NAME}={source.identity().get(NAME)}, whose learn() does "
            "not share lessons: leave learn() to sglight.gradients.SyntheticGradient, or set trainer.replicas=1"
        )
