"""Sobolev estimators: the gradient of a local classifier, which learns from the label and from the true gradient.

Czarnecki et al. 2017, "Sobolev training for neural networks", section 4.3. With l the loss of a head (see `Head`), phi
its parameters and g = dL/dh:

    d = dl(h, y)/dh,    phi learns from l(h, y) + ||dl(h, y)/dh - g||^2

There the classifier learns from the answers of the network; here from the label, so that only g is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from sglight.errors import UserError
from sglight.gradients.estimators import TrainedEstimator
from sglight.gradients.heads import Head


class SobolevGradient(TrainedEstimator):
    """The gradient of a head's loss; the head learns to have the true one."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        _check_twice(head)
        self.head = head

    @override
    def estimate(self, state: Tensor, labels: Tensor, time: float) -> Tensor:
        return self.head.estimate(state, labels, time)

    @override
    def learn(self, state: Tensor, labels: Tensor, target: Tensor, time: float) -> Tensor:
        """One optimiser step on the mean of both losses; returns the mean squared error of the gradient before it."""
        assert self.optimizer is not None
        state = state.detach().requires_grad_()
        loss, normaliser = self.head.loss(state, labels), self.head.criterion.normaliser(labels)
        (gradient,) = torch.autograd.grad(loss, state, create_graph=True)
        error = (gradient - target).square().sum()
        self.optimizer.zero_grad()
        ((loss + error) / (normaliser or 1.0)).backward()
        mean = self.average(error.detach() / (normaliser or 1.0), normaliser)
        self.step()
        return mean


def _check_twice(head: Head) -> None:
    """Refuse a loss that torch cannot differentiate twice, which a lesson does."""
    logits, label = torch.zeros(1, head.classes, requires_grad=True), torch.zeros(1, dtype=torch.long)
    (gradient,) = torch.autograd.grad(head.criterion.total(logits, label), logits, create_graph=True)
    try:
        if gradient.requires_grad:
            torch.autograd.grad(gradient.sum(), logits, allow_unused=True)
    except RuntimeError as error:
        raise UserError(
            "strategy.estimator.form=sobolev needs a loss with second derivatives, and that of strategy.loss.name has "
            f"none ({error}); choose cross_entropy or mse, or strategy.estimator.form=direct"
        ) from error
