"""Is a network stable? How it changes states, perturbations and gradients, step by step and as a whole.

States are measured in the coordinates of `Dynamics.to_phase`, so that step sizes and dynamics can be compared. Over
several samples, spectra and growth are those of the worst sample; norms are means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sglight.networks.dynamics import State
from sglight.networks.network import Stage
from sglight.networks.segment import Segment
from sglight.networks.spectrum import (
    Map,
    jacobian,
    largest_singular_value,
    singular_values,
    spectral_radius,
)

PERTURBATION = 1e-3  # norm of the perturbation of the first state, relative to the state's


class StepSpectrum(NamedTuple):
    """Extreme singular values and spectral radius of the Jacobian of a time step; None if it is too large to form."""

    sigma_max: float
    sigma_min: float | None = None
    radius: float | None = None


@dataclass(frozen=True)
class Stability:
    """The stability of a network of N time steps, measured on some samples.

    Attributes:
        steps: the spectra of the N steps.
        state_norm, gradient_norm: mean norms of the N + 1 states h (before, between and after the steps) and of
            dL/dh, where L is the cross-entropy of one sample.
        growth: the factor by which a small random perturbation of the first state has grown in each of these states.
        flow_sigma_max: largest singular value of the Jacobian of all steps and connectors together.
        reversal_error: ||inverse(forward(h)) - h|| / ||h||, the largest over all segments; None if the dynamics has
            no inverse.
    """

    steps: list[StepSpectrum]
    state_norm: list[float]
    gradient_norm: list[float]
    growth: list[float]
    flow_sigma_max: float
    reversal_error: float | None


class Link(NamedTuple):
    """A part of the flow: a time step, or a connector between segments."""

    map: Map
    is_step: bool


def analyse(
    network: Stage, x: Tensor, labels: Tensor, exact_up_to: int = 256, iterations: int = 12, seed: int = 0
) -> Stability:
    """Measures the `Stability` of a whole network in ``eval()`` mode.

    Args:
        network: with opening and classifier.
        x: samples ``[B, *shape]``.
        labels: ``[B]``.
        exact_up_to: states of at most so many values get their Jacobians as matrices; for larger ones
            `largest_singular_value` gives a lower bound.
        iterations: of `largest_singular_value`.
        seed: of the perturbations.
    """
    assert network.is_first and network.is_last and not network.training
    generator = torch.Generator().manual_seed(seed)
    links, (start, end) = flow(network)
    with torch.no_grad():
        first = start(network.open(x))
        states = trajectory(links, first)
        noise = torch.randn(first.shape, generator=generator, dtype=first.dtype).to(first.device)
        shift = noise * (PERTURBATION * norms(first) / norms(noise)).view(-1, *[1] * (first.ndim - 1))
        shifted = trajectory(links, first + shift)
    spectra = list[StepSpectrum]()
    product: Tensor | None = torch.eye(first[0].numel(), dtype=first.dtype, device=first.device)
    for link, state, after in zip(links, states, states[1:], strict=False):
        matrix = None
        if max(state[0].numel(), after[0].numel()) <= exact_up_to:
            matrix = jacobian(link.map, state)
        product = None if matrix is None or product is None else matrix @ product
        if link.is_step:
            spectra.append(_spectrum(link.map, state, matrix, iterations, generator))
    if product is None:
        whole = largest_singular_value(partial(_through, links), first, iterations, generator)
    else:
        whole = singular_values(product)[:, 0]
    # Without the states after connectors: one state for each step.
    kept = [0, *(k + 1 for k, link in enumerate(links) if link.is_step)]
    gradients = _gradients(network, links, end, first, labels)
    return Stability(
        steps=spectra,
        state_norm=[float(norms(states[k]).mean()) for k in kept],
        gradient_norm=[float(norms(gradients[k]).mean()) for k in kept],
        growth=[float((norms(shifted[k] - states[k]) / norms(shift)).max()) for k in kept],
        flow_sigma_max=float(whole.max()),
        reversal_error=reversal_error(network, x) if network.spec.rule.reversible else None,
    )


def flow(network: Stage) -> tuple[list[Link], tuple[Map, Map]]:
    """The steps and connectors in order, and the changes of coordinates before the first and after the last one."""
    rule, links = network.spec.rule, list[Link]()
    segments = [part for part in network.flow() if isinstance(part, Segment)]
    sizes = iter([segment.step_size for segment in segments])
    h = next(sizes)
    for part in network.flow():
        before = _on_fields(rule.from_phase, rule.fields, h)
        if isinstance(part, Segment):
            after = _on_fields(rule.to_phase, rule.fields, h)
            links += [Link(_chain(before, step, after), True) for step in part.step_functions()]
        else:
            h = next(sizes)
            links.append(Link(_chain(before, part, _on_fields(rule.to_phase, rule.fields, h)), False))
    ends = (
        _on_fields(rule.to_phase, rule.fields, segments[0].step_size),
        _on_fields(rule.from_phase, rule.fields, h),
    )
    return links, ends


def trajectory(links: Sequence[Link], state: Tensor) -> list[Tensor]:
    """The states before, between and after the steps and connectors."""
    states = [state]
    for link in links:
        states.append(link.map(states[-1]))
    return states


def reversal_error(network: Stage, x: Tensor) -> float:
    """The reversal error of `Stability` for samples x ``[B, *shape]``."""
    worst = 0.0
    with torch.no_grad():
        state = network.open(x)
        for part in network.flow():
            after = part(state)
            if isinstance(part, Segment):
                errors = norms(part.inverse(after) - state) / norms(state)
                worst = max(worst, float(errors.nan_to_num(torch.inf).max()))
            state = after
    return worst


def norms(states: Tensor) -> Tensor:
    """The Euclidean norm of each sample ``[B]``."""
    return states.flatten(1).norm(dim=1)


def _spectrum(
    step: Map, state: Tensor, matrix: Tensor | None, iterations: int, generator: torch.Generator
) -> StepSpectrum:
    if matrix is None:
        return StepSpectrum(float(largest_singular_value(step, state, iterations, generator).max()))
    sigma = singular_values(matrix)
    return StepSpectrum(
        float(sigma[:, 0].max()), float(sigma[:, -1].min()), float(spectral_radius(matrix).max())
    )


def _gradients(
    network: Stage, links: Sequence[Link], end: Map, first: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    """dL/dh for all states h of `trajectory`."""
    assert network.classifier is not None
    with torch.enable_grad():
        states = trajectory(links, first.detach().requires_grad_())
        loss = F.cross_entropy(network.classifier(end(states[-1])), labels, reduction="sum")
        return torch.autograd.grad(loss, states)


def _on_fields(change: Callable[[State, float], State], fields: int, h: float) -> Map:
    """A change of coordinates as a map of joined states."""
    return lambda state: torch.cat(change(state.chunk(fields, 1), h), 1)


def _chain(*maps: Map) -> Map:
    """One map after the other."""
    return lambda state: reduce(lambda s, f: f(s), maps, state)


def _through(links: Sequence[Link], state: Tensor) -> Tensor:
    return trajectory(links, state)[-1]
