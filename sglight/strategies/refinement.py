"""The moments of optimisers when a network is refined in time.

A gradient with respect to one sample theta_j is h times a function of time. So where h is halved, first moments are
prolonged as theta is and multiplied by 1/2, second moments by 1/4.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from sglight.link import Peers
from sglight.networks import Stage
from sglight.networks.segment import Rule, prolong

# What halving h does to the moments of a gradient, by the optimisers' names for them.
MOMENTS = {"exp_avg": 0.5, "exp_avg_sq": 0.25, "momentum_buffer": 0.5}

# An optimiser's state: of each parameter, by its number, what belongs to it, by name.
State = dict[int, dict[str, Any]]


def heads(stages: Mapping[int, Stage], states: Sequence[State], peers: Peers) -> dict[int, dict[str, Tensor]]:
    """Of all stages that begin within a segment, wherever they live: first samples, also of the moments."""
    own: dict[int, dict[str, Tensor]] = {}
    for (i, stage), state in zip(stages.items(), states, strict=False):
        head = stage.first_samples()
        moments = {f"{n}/{kind}": value[0].clone() for n, kind, value in _moments(stage, state) if n in head}
        own[i] = head | moments
    return dict(ChainMap(*peers.share(own)))


def prolonged(state: State, stage: Stage, rule: Rule, following: Mapping[str, Tensor]) -> State:
    """An optimiser's state for a refined stage."""
    fine = {k: dict(values) for k, values in state.items()}
    numbers = {name: k for k, (name, _) in enumerate(stage.named_parameters())}
    for name, kind, value in _moments(stage, state):
        if name.startswith("segments."):
            samples = prolong(value, rule, following.get(f"{name}/{kind}"))
            fine[numbers[name]][kind] = MOMENTS[kind] * samples
    return fine


def _moments(stage: Stage, state: State) -> Iterator[tuple[str, str, Tensor]]:
    """Name of the parameter, kind and value of all moments in an optimiser's state."""
    for k, (name, _) in enumerate(stage.named_parameters()):
        for kind, value in state.get(k, {}).items():
            if kind in MOMENTS and value is not None:
                yield name, kind, value
