"""What estimators and heads see of a network whose step size changes in a multilevel training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sglight.networks.dynamics import DYNAMICS, Dynamics


@dataclass(frozen=True)
class Restepped:
    """Converts states and gradients to the step size of the coarsest level, at which they have begun to learn.

    In a multilevel training the step size h changes. The state of leapfrog contains y_prev, that is a velocity times
    h, which would look different to an estimator.

    Args:
        rule: the dynamics.
        ratio: the step size of the coarsest level, divided by the present one.
    """

    rule: Dynamics
    ratio: float

    def state(self, state: Tensor) -> Tensor:
        """A state as the estimator gets it."""
        return self._changed(self.rule.restepped, state, self.ratio)

    def target(self, gradient: Tensor) -> Tensor:
        """A true gradient as the estimator gets it."""
        return self._changed(self.rule.restepped_gradient, gradient, self.ratio)

    def gradient(self, estimate: Tensor) -> Tensor:
        """An estimated gradient converted back to the present step size."""
        return self._changed(self.rule.restepped_gradient, estimate, 1 / self.ratio)

    def _changed(
        self, change: Callable[[tuple[Tensor, ...], float], tuple[Tensor, ...]], state: Tensor, ratio: float
    ) -> Tensor:
        """Applies ``change`` to a state whose fields are joined along the channels."""
        if ratio == 1:
            return state
        parts = state.chunk(self.rule.fields, 1)
        changed = change(parts, ratio)
        return state if changed is parts else torch.cat(changed, 1)


UNCHANGED = Restepped(DYNAMICS["euler"], 1.0)  # outside of a multilevel training
