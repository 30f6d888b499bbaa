"""Residual estimators: the gradient of a local head plus a prediction of what it lacks.

With l the loss of the head (see `Head`) and SG a synthetic gradient, both trained:

    d = dl(h, y)/dh + SG(h, y),    SG learns from (h, y, dL/dh - dl/dh)
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from sglight.gradients.estimators import SyntheticGradient, TrainedEstimator
from sglight.gradients.heads import Head


class ResidualGradient(TrainedEstimator):
    """The gradient of a head's loss plus the prediction of a model; one optimiser trains both."""

    def __init__(self, head: Head, model: SyntheticGradient) -> None:
        super().__init__()
        self.head, self.model = head, model

    @override
    def estimate(self, state: Tensor, labels: Tensor, time: float) -> Tensor:
        return self.head.estimate(state, labels, time) + self.model.estimate(state, labels, time)

    @override
    def learn(self, state: Tensor, labels: Tensor, target: Tensor, time: float) -> Tensor:
        """One step of the head on its mean loss, and of the model on the squared error of the sum."""
        assert self.optimizer is not None
        self.optimizer.zero_grad()
        local, _ = self.head.gradients(state, labels)
        loss = (self.model(state, labels) - (target - local)).square().sum() / max(len(labels), 1)
        loss.backward()
        loss = self.model.average(loss, len(labels))  # the head's are averaged by now
        self.step()
        return loss.detach()
