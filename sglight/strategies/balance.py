"""Cuts into stages of equal cost as it is measured, where the cost model is not trusted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter

import torch

from sglight.gradients import Passage
from sglight.networks import Stage
from sglight.networks.network import balanced
from sglight.strategies.plan import Plan

# How often cuts are moved at most, and how often each stage is then timed; of its times the shortest counts.
MOVES, ROUNDS = 5, 5


def measured_cuts(plan: Plan, samples: int, device: str | torch.device = "cpu") -> tuple[int, ...]:
    """Where to cut so that the slowest stage is as fast as can be, all M + 1 positions.

    The stages that a plan's cuts make are timed, forward and backward on one piece of a batch of noise; the work of
    each time step is scaled by what its stage took, and that is balanced anew, until nothing moves. Of all cuts tried,
    those with the fastest slowest stage. The result depends on the machine and on its load.

    Args:
        samples: in a batch.
    """
    spec, cuts, stages = plan.spec, plan.cuts, plan.last + 1
    work, tried = spec.step_work(), dict[tuple[int, ...], float]()
    for _ in range(MOVES):
        times = stage_seconds(plan, cuts, max(samples // plan.schedule.pieces, 1), torch.device(device))
        tried[cuts] = max(times)
        for (a, b), seconds in zip(pairwise(cuts), times, strict=True):
            scale = seconds / sum(work[a:b])
            work[a:b] = [scale * cost for cost in work[a:b]]
        cuts = tuple(balanced(work, stages))
        if cuts in tried:
            break
    return min(tried, key=lambda each: tried[each])


def stage_seconds(plan: Plan, cuts: Sequence[int], samples: int, device: torch.device) -> list[float]:
    """The shortest time that a forward and a backward pass of each stage take, all stages in turn."""
    spec, source = plan.spec, plan.source
    stages = [Stage(spec, a, b).to(device) for a, b in pairwise(cuts)]
    shapes = [(samples, *spec.shape), *((samples, *spec.state_shape(a)) for a in cuts[1:-1])]
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    labels = torch.zeros(samples, dtype=torch.long, device=device)
    best = [float("inf")] * len(stages)
    for _ in range(ROUNDS):
        for i, (stage, x) in enumerate(zip(stages, inputs, strict=True)):
            _wait(device)
            begin = perf_counter()
            passage = Passage(0, 0, labels, x.detach().requires_grad_(i > 0), None, x)
            output = source.forward(stage, passage)
            passage.state = output.detach()
            passage.output = output if output.requires_grad else None
            if i > 0 and passage.entered is not None:
                passage.entered.requires_grad_()
            source.output(stage, passage).backward(torch.ones_like(output))
            _wait(device)
            best[i] = min(best[i], perf_counter() - begin)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
