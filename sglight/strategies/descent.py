"""Prepares gradients for the optimisers: from those of the summed loss to those of mean loss and penalties, clipped."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sglight.compat.torch import scale_
from sglight.link import Placement
from sglight.networks import Stage
from sglight.networks.regularisers import Edge, penalty
from sglight.strategies.plan import Plan


def prepare_stage(plan: Plan, stage: Stage, normaliser: float) -> None:
    """Prepares the gradients of one stage, with its own penalties, clipped by its own norm.

    Args:
        plan: has penalties and clipping.
        stage: whose parameters have the gradients of the summed loss.
        normaliser: the summed loss is divided by this.
    """
    _scale_and_penalise(plan, [stage], normaliser)
    if plan.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(_with_gradients(stage), plan.clip_norm)


def prepare_network(plan: Plan, stages: Sequence[Stage], normaliser: float, placement: Placement) -> None:
    """Prepares the gradients of all stages, also of other workers, as those of one network.

    Penalties count across the cuts, and the gradient is clipped by the norm of the whole network, summed in the order
    of the stages. All workers must call it with their stages; they wait for each other if they need to exchange
    anything.
    """
    before = after = None
    if plan.regularisation.get("smoothness") and placement.pipeline.size > 1:
        # The parameters of neighbouring stages before any update with this batch.
        edges = placement.pipeline.share((stages[0].first_samples(), stages[-1].last_samples()))
        rank, device = placement.pipeline.rank, next(stages[0].parameters()).device
        before = _on(device, edges[rank - 1][1]) if rank > 0 else None
        after = _on(device, edges[rank + 1][0]) if rank + 1 < len(edges) else None
    _scale_and_penalise(plan, stages, normaliser, before, after)
    if plan.clip_norm is None:
        return
    norms = [0.0] * (plan.last + 1)
    for i, stage in zip(placement.own, stages, strict=True):
        norms[i] = float(torch.nn.utils.get_total_norm(_gradients(stage)))
    if placement.pipeline.size > 1:
        norms = placement.pipeline.total(norms).result()
    total = norms[0] if len(norms) == 1 else math.sqrt(sum(norm * norm for norm in norms))
    for stage in stages:
        parameters = _with_gradients(stage)
        norm = torch.tensor(total, dtype=parameters[0].dtype, device=parameters[0].device)
        torch.nn.utils.clip_grads_with_norm_(parameters, plan.clip_norm, norm)


def describe(plan: Plan) -> str:
    """A short description of clipping and smoothing; empty without them."""
    whole, about = plan.schedule.flushes or plan.last == 0, []
    if plan.clip_norm is not None:
        whose = "the whole gradient" if whole else "each stage's gradient"
        about.append(f"{whose} clipped at {plan.clip_norm:g}")
    if plan.regularisation.get("smoothness"):
        about.append(f"smooth in time {'across cuts' if whole else 'within stages'}")
    return ", ".join(about)


def _scale_and_penalise(
    plan: Plan,
    stages: Sequence[Stage],
    normaliser: float,
    before: Edge | None = None,
    after: Edge | None = None,
) -> None:
    for stage in stages:
        scale_(_gradients(stage), 1 / normaliser)
    extra = penalty(stages, **plan.regularisation, before=before, after=after)
    if extra is not None:
        extra.backward()
    for stage in stages:
        _decay_more(plan, stage)


def _decay_more(plan: Plan, stage: Stage) -> None:
    """Increases weight decay at a coarse level, where gradients are larger in proportion to the step size."""
    more = plan.optimizer.get("weight_decay", 0.0) * (plan.coarseness - 1)
    if more and plan.optimizer["name"] != "adamw":  # the decay of adamw is not added to gradients
        for name, parameter in stage.named_parameters():
            if name.startswith("segments.") and parameter.grad is not None:
                parameter.grad.add_(parameter.detach(), alpha=more)


def _with_gradients(stage: Stage) -> list[Tensor]:
    return [p for p in stage.parameters() if p.grad is not None]


def _gradients(stage: Stage) -> list[Tensor]:
    return [p.grad for p in stage.parameters() if p.grad is not None]


def _on(device: torch.device, edge: Edge) -> Edge:
    return {name: sample.to(device) for name, sample in edge.items()}
