"""How well estimators predict true gradients: compared now and then, without a trace in the training."""

from __future__ import annotations

import torch
from torch import Tensor

from sglight.gradients import Passage
from sglight.gradients.base import compare, own_statistics
from sglight.strategies.runtime import Runtime


class Diagnosis:
    """When gradients are compared: in batches that are logged, and at least ``every`` batches apart; 0 for never.

    Attributes:
        next: the first batch in which that may be.
    """

    def __init__(self, every: int) -> None:
        self.every, self.next = every, 0

    def is_due(self, batch: int, log_every: int) -> bool:
        """Whether to compare in this batch, the training's ``batch``-th."""
        if not (self.every and log_every and (batch + 1) % log_every == 0 and batch >= self.next):
            return False
        self.next = batch + self.every
        return True


def compare_all(runtime: Runtime, x: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    """How well each estimator here predicts the true gradient of this batch, before anything is updated.

    One pass forward and back through all stages, in which each worker waits for its neighbours.
    """
    runtime.collect()
    plan, own, known = runtime.plan, runtime.placement.own, dict[str, Tensor]()
    with own_statistics(runtime.stages):
        inputs: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        for i in own:
            inputs[i] = runtime.enter(i, x, len(labels)).detach().requires_grad_()
            outputs[i] = runtime.stage(i)(inputs[i])
            if i < plan.last:
                runtime.hand_down(i, outputs[i].detach())
        for i in reversed(own):
            if i == plan.last:
                gradient, outputs[i] = None, plan.loss.total(outputs[i], labels)
            else:
                gradient = runtime.receive_gradient(i, len(labels))
                passage = Passage(0, 0, labels, None, None, outputs[i].detach())
                estimate = plan.source.estimate(runtime.boundary(i), passage)
                known |= {f"estimator_{i}/{k}": v for k, v in compare(estimate, gradient).items()}
            if i > 0:
                runtime.hand_up(i, torch.autograd.grad(outputs[i], inputs[i], gradient)[0])
    return known
