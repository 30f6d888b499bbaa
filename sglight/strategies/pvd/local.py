"""How a processor minimises over its variables: some steps of a local solver on each batch of an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from sglight.strategies.optim import forget_moments, make_optimizer

# Gives the variables their gradients, and returns the value.
Closure = Callable[[], float]
# Takes a step of an optimiser, with hooks around it.
Step = Callable[[Optimizer, Closure], Any]


class LocalSolver(ABC):
    """A solver for the subproblems of all processors; add a subclass and its name in `SOLVERS`.

    It has no state: that is in the processors' optimisers, which Lightning keeps for checkpoints and learning rates.

    Args:
        config: of the optimiser, see `optim.py`. steps: on each batch.
        clip_norm: largest norm of the gradient of a processor's variables; None for no limit.

    Attributes:
        name: what it is called where it is not the config's optimiser that takes the steps, otherwise empty.
    """

    name: ClassVar[str] = ""

    def __init__(self, config: Mapping[str, Any], steps: int, clip_norm: float | None) -> None:
        self.config, self.steps, self.clip_norm = config, steps, clip_norm

    @property
    def directions(self) -> str:
        """The kind of `Directions` along which a scalar of 1 is about as far as one of its steps."""
        return "normalised"

    @abstractmethod
    def optimizer(self, variables: Sequence[nn.Parameter]) -> Optimizer:
        """A processor's optimiser."""

    @abstractmethod
    def descend(self, optimizer: Optimizer, closure: Closure, step: Step) -> None:
        """Take the steps on a batch, of a processor's optimiser, with the closure of the objective on this batch."""

    def restart(self, optimizer: Optimizer) -> None:
        """Forget what has led to a point that was refused, since it would do so again."""
        forget_moments(optimizer)


class FirstOrder(LocalSolver):
    """Steps of the config's optimiser, which keeps its moments over batches and iterations."""

    @property
    @override
    def directions(self) -> str:
        return "rms" if self.config["name"] in ("adam", "adamw") else "normalised"

    @override
    def optimizer(self, variables: Sequence[nn.Parameter]) -> Optimizer:
        # The decay is in the objective.
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
    """At most ``steps`` iterations of L-BFGS with a line search, begun anew on each batch.

    Raises:
        ValueError: for a ``clip_norm``, which would belie the line search.
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
        # The next batch is another objective, with another curvature.
        optimizer.state.clear()


SOLVERS: dict[str, type[LocalSolver]] = {"first_order": FirstOrder, "lbfgs": LBFGS}
