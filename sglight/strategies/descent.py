"""From summed gradients to those with which a stage's optimiser steps."""

from __future__ import annotations

import torch
from torch import Tensor

from sglight.networks import Stage
from sglight.networks.regularisers import penalty
from sglight.strategies.plan import Plan


def prepare(plan: Plan, stage: Stage, normaliser: float) -> None:
    """Make a stage's gradients those of the mean loss and the penalties, clipped.

    Args:
        normaliser: what the summed loss, whose gradients the parameters have, is divided by.
    """
    parameters = [p for p in stage.parameters() if p.grad is not None]
    torch._foreach_mul_(gradients(stage), 1 / normaliser)
    extra = penalty([stage], **plan.regularisation)
    if extra is not None:
        extra.backward()
    decay_more(plan, stage)
    if plan.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, plan.clip_norm)


def gradients(stage: Stage) -> list[Tensor]:
    """The gradients that a stage's parameters have."""
    return [p.grad for p in stage.parameters() if p.grad is not None]


def decay_more(plan: Plan, stage: Stage) -> None:
    """At a coarse level gradients are larger, as the steps are longer: so is to be what weight decay adds to them."""
    more = plan.optimizer.get("weight_decay", 0.0) * (plan.coarseness - 1)
    if more and plan.optimizer["name"] != "adamw":  # whose decay does not add to gradients
        for name, parameter in stage.named_parameters():
            if name.startswith("segments.") and parameter.grad is not None:
                parameter.grad.add_(parameter.detach(), alpha=more)
