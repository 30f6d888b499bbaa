"""Interpolates the moments of optimisers when a network is refined in time.

The gradient with respect to the parameters theta_j of one time step is h times a function of time. So when h is halved,
first moments are interpolated like theta and multiplied by 1/2, second moments by 1/4.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from sglight.link import Peers
from sglight.networks import Stage
from sglight.networks.segment import Rule, prolong

# The factor of each kind of moment (by torch's name) when h is halved.
MOMENTS = {"exp_avg": 0.5, "exp_avg_sq": 0.25, "momentum_buffer": 0.5}

# The state of an optimiser: for each parameter, by its number, its values by name.
State = dict[int, dict[str, Any]]


def heads(stages: Mapping[int, Stage], states: Sequence[State], peers: Peers) -> dict[int, dict[str, Tensor]]:
    """For each stage that begins within a segment, the parameters and moments of its first time step.

    Every worker must call it; the result has the stages of all workers.
    """
    own: dict[int, dict[str, Tensor]] = {}
    for (i, stage), state in zip(stages.items(), states, strict=False):
        head = stage.first_samples()
        moments = {f"{n}/{kind}": value[0].clone() for n, kind, value in _moments(stage, state) if n in head}
        own[i] = head | moments
    return dict(ChainMap(*peers.share(own)))


def prolonged(state: State, stage: Stage, rule: Rule, following: Mapping[str, Tensor]) -> State:
    """The state of an optimiser for a refined stage.

    Args:
        state: before the refinement.
        stage: before the refinement.
        rule: of the interpolation, see `prolong`.
        following: the entry of the next stage in `heads`.
    """
    fine = {k: dict(values) for k, values in state.items()}
    numbers = {name: k for k, (name, _) in enumerate(stage.named_parameters())}
    for name, kind, value in _moments(stage, state):
        if name.startswith("segments."):
            samples = prolong(value, rule, following.get(f"{name}/{kind}"))
            fine[numbers[name]][kind] = MOMENTS[kind] * samples
    return fine


def _moments(stage: Stage, state: State) -> Iterator[tuple[str, str, Tensor]]:
    """All moments in the state of an optimiser: name of the parameter, kind, value."""
    for k, (name, _) in enumerate(stage.named_parameters()):
        for kind, value in state.get(k, {}).items():
            if kind in MOMENTS and value is not None:
                yield name, kind, value
