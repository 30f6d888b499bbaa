"""Finds cuts for which all stages take the same measured time, for ``strategy.balance=measured``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from time import perf_counter

import torch

from sglight.gradients import Passage
from sglight.networks import Stage
from sglight.networks.network import balanced
from sglight.strategies.plan import Plan

MOVES = 5  # cuts are moved at most so many times
ROUNDS = 5  # each stage is timed so many times, and the shortest time counts


def measured_cuts(plan: Plan, samples: int, device: str | torch.device = "cpu") -> tuple[int, ...]:
    """The M + 1 positions of the cuts for which the slowest stage is as fast as possible.

    The stages are timed, forward and backward on a microbatch of noise. The cost of each time step is scaled by the
    time of its stage, and the cuts are balanced anew, until they do not move any more. Of all cuts that were tried,
    those with the fastest slowest stage are returned. The result depends on the machine and its load.

    Args:
        plan: has the network and the first cuts.
        samples: in a batch.
        device: on which to measure.
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
    """The shortest time of a forward and backward pass of each stage; all stages are timed in turn."""
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
