"""Local solvers, with which a processor minimises over its variables: some steps on each batch of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from sglight.strategies.optim import forget_moments, make_optimizer

Closure = Callable[[], float]  # computes the gradients of the variables and returns the value
Step = Callable[[Optimizer, Closure], Any]  # steps an optimiser, with Lightning's hooks


class LocalSolver(ABC):
    """A solver for the subproblems of all processors. For a new one add a subclass to `SOLVERS`.

    It has no state; the optimisers of the processors have, and Lightning writes them into checkpoints.

    Args:
        config: of the optimiser, see `optim.py`.
        steps: on each batch.
        clip_norm: the largest norm of the gradient of a processor's variables; None for no limit.

    Attributes:
        name: of the solver; empty if it is the optimiser of the config.
    """

    name: ClassVar[str] = ""

    def __init__(self, config: Mapping[str, Any], steps: int, clip_norm: float | None) -> None:
        self.config, self.steps, self.clip_norm = config, steps, clip_norm

    @property
    def directions(self) -> str:
        """The kind of `Directions` for which a scalar of 1 is about as far as one step of the solver."""
        return "normalised"

    @abstractmethod
    def optimizer(self, variables: Sequence[nn.Parameter]) -> Optimizer:
        """The optimiser of a processor."""

    @abstractmethod
    def descend(self, optimizer: Optimizer, closure: Closure, step: Step) -> None:
        """Take the steps on a batch.

        Args:
            optimizer: of the processor.
            closure: evaluates the objective on the batch.
            step: steps the optimiser.
        """

    def restart(self, optimizer: Optimizer) -> None:
        """Forget the moments that led to a point that was refused, as they would lead there again."""
        forget_moments(optimizer)


class FirstOrder(LocalSolver):
    """Steps of the optimiser of the config, which keeps its moments from batch to batch."""

    @property
    @override
    def directions(self) -> str:
        return "rms" if self.config["name"] in ("adam", "adamw") else "normalised"

    @override
    def optimizer(self, variables: Sequence[nn.Parameter]) -> Optimizer:
        # Weight decay is part of the objective.
        return make_optimizer({**self.config, "weight_decay": 0.0}, variables)

    @override
    def descend(self, optimizer: Optimizer, closure: Closure, step: Step) -> None:
        def clipped() -> float:
            value = closure()
            if self.clip_norm is not None:
                variables = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(variables, self.clip_norm)
            return value

        for _ in range(self.steps):
            step(optimizer, clipped)


class LBFGS(LocalSolver):
    """At most ``steps`` iterations of L-BFGS with a line search on each batch, without memory of earlier batches.

    Raises:
        ValueError: for a ``clip_norm``, with which the line search would get wrong gradients.
    """

    name = "L-BFGS"

    def __init__(self, config: Mapping[str, Any], steps: int, clip_norm: float | None) -> None:
        super().__init__(config, steps, clip_norm)
        if clip_norm is not None:
            raise ValueError(
                "strategy.clip_norm does not go with strategy.local_solver=lbfgs; set it to null"
            )

    @override
    def optimizer(self, variables: Sequence[nn.Parameter]) -> Optimizer:
        return torch.optim.LBFGS(variables, max_iter=self.steps, line_search_fn="strong_wolfe")

    @override
    def descend(self, optimizer: Optimizer, closure: Closure, step: Step) -> None:
        step(optimizer, closure)
        # The next batch gives another objective with another curvature.
        optimizer.state.clear()


SOLVERS: dict[str, type[LocalSolver]] = {"first_order": FirstOrder, "lbfgs": LBFGS}
