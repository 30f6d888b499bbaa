"""True gradients that arrive late: three kinds of backward passes after weights have changed since the forward pass.

They differ in what is kept of a microbatch between the two passes:

    stashed    the graph of the forward pass with a copy of its weights             (Narayanan et al. 2019, PipeDream)
    replayed   the input; a second forward pass uses the present weights            (Huo et al. 2018, features replay)
    rebuilt    the output; states are rebuilt with the present weights              (Rivaud et al. 2025, PETRA)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from sglight.gradients.base import Passage, own_statistics, run
from sglight.gradients.true import TrueGradient
from sglight.networks import NetworkSpec, Stage
from sglight.networks.segment import Segment


class Stashed(TrueGradient):
    """The backward pass goes through the graph of the forward pass, with the weights of that time."""

    stashes: ClassVar[bool] = True

    @override
    def forward(self, stage: Stage, passage: Passage) -> Tensor:
        return run(stage, passage)


class Replayed(TrueGradient):
    """The input is kept; before the backward pass the stage goes forward again with its present weights."""

    @override
    def forward(self, stage: Stage, passage: Passage) -> Tensor:
        with torch.no_grad():
            return stage(passage.entered)

    @override
    def output(self, stage: Stage, passage: Passage) -> Tensor:
        return run(stage, passage, statistics=False)


class Rebuilt(TrueGradient):
    """The outputs of the segments are kept; the backward pass rebuilds their states with the present weights.

    Opening, connectors and classifier have no inverse; they go forward again from their inputs.
    """

    rebuilds: ClassVar[bool] = True

    @override
    def forward(self, stage: Stage, passage: Passage) -> Tensor:
        entered = passage.entered
        assert entered is not None
        with torch.no_grad():
            state, ends = stage.open(entered) if stage.is_first else entered, []
            for part in stage.flow():
                state = part(state)
                if isinstance(part, Segment):
                    ends.append(state)
            passage.ends = ends
            if not stage.is_first:
                # Only its gradient is needed, so its values are freed.
                passage.entered = entered.new_empty(()).expand(entered.shape)
            return state if stage.classifier is None else stage.classifier(state)

    @override
    def output(self, stage: Stage, passage: Passage) -> Tensor:
        assert passage.entered is not None and passage.ends is not None
        ends = iter(passage.ends)
        with own_statistics(stage):
            state = stage.open(passage.entered) if stage.is_first else passage.entered
            for part in stage.flow():
                state = part.rebuilt(state, next(ends)) if isinstance(part, Segment) else part(state)
            return state if stage.classifier is None else stage.classifier(state)


def check_backward(backward: str, spec: NetworkSpec) -> None:
    """Refuse a backward pass that does not exist, or that the network does not allow.

    Raises:
        ValueError: about ``strategy.backward``.
    """
    if backward not in BACKWARDS:
        raise ValueError(f"strategy.backward={backward} is unknown; choose one of {', '.join(BACKWARDS)}")
    if backward == "rebuilt":
        check_rebuilt(spec)


def check_rebuilt(spec: NetworkSpec) -> None:
    """Refuse a network whose states cannot be rebuilt.

    Raises:
        ValueError: for a dynamics without an inverse, or normalisation that hides it.
    """
    if not spec.rule.reversible:
        raise ValueError(
            f"strategy.backward=rebuilt needs a dynamics with an inverse, as model=hamiltonian or leapfrog, not "
            f"{spec.dynamics}; use strategy.backward=replayed or stashed"
        )
    if spec.normalisation == "batch":
        raise ValueError(
            "strategy.backward=rebuilt does not go with model.normalisation=batch, whose states cannot be rebuilt; "
            "use group, layer or none, or strategy.backward=stashed"
        )


BACKWARDS: dict[str, type[TrueGradient]] = {"stashed": Stashed, "replayed": Replayed, "rebuilt": Rebuilt}
