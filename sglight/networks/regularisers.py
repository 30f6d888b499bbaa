"""Penalties on the parameters as functions of time, and on the classifier as a function of the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sglight.networks.network import Stage

# The parameters of one time step, by their names in the state dict of a stage.
Edge = Mapping[str, Tensor]


def time_smoothness(parts: Sequence[Tensor], step_size: float) -> Tensor:
    """How rough a parameter is as a function of time: 1/(2h) sum_j ||theta_{j+1} - theta_j||^2.

    This discretises 1/2 int ||theta'(t)||^2 dt (Haber & Ruthotto 2017, section 3.3; Chang et al. 2018).

    Args:
        parts: consecutive pieces ``[N_i, ...]`` of one parameter; differences across the pieces count too.
        step_size: h.

    >>> time_smoothness([torch.tensor([0.0, 1.0]), torch.tensor([3.0])], step_size=0.5)
    tensor(5.)
    """
    theta = torch.cat(list(parts))
    return theta.diff(dim=0).square().sum() / (2 * step_size)


def image_smoothness(weight: Tensor) -> Tensor:
    """Half the sum of squared differences between neighbouring pixels of the weights ``[classes, C, H, W]``.

    Source: Haber & Ruthotto 2017, section 3.3.
    """
    return 0.5 * (weight.diff(dim=2).square().sum() + weight.diff(dim=3).square().sum())


def penalty(
    stages: Sequence[Stage],
    smoothness: float = 0.0,
    classifier_smoothness: float = 0.0,
    before: Edge | None = None,
    after: Edge | None = None,
) -> Tensor | None:
    """The weighted sum of all penalties of consecutive stages; None if there is nothing to add.

    Args:
        stages: in order, each continuing the one before; the cuts between them count too.
        smoothness: weight alpha_f of `time_smoothness`, for weights and biases.
        classifier_smoothness: weight of `image_smoothness`, if the classifier takes whole images.
        before, after: the `Stage.last_samples` of the stage before these and the `Stage.first_samples` of the stage
            after them, so that the outer cuts count too.
    """
    terms: list[Tensor] = []
    if smoothness:
        for key in dict.fromkeys(key for stage in stages for key in stage.segments):
            pieces = [stage.segments[key] for stage in stages if key in stage.segments]
            for name in ("weight", "bias"):
                parts = [getattr(piece, name) for piece in pieces]
                place = f"segments.{key}.{name}"
                parts = [*_row(before, place), *parts, *_row(after, place)]
                terms.append(smoothness * time_smoothness(parts, float(pieces[0].step_size)))  # type: ignore[arg-type]
    classifier = stages[-1].classifier
    if classifier_smoothness and classifier is not None and classifier.image_weight is not None:
        terms.append(classifier_smoothness * image_smoothness(classifier.image_weight))
    return torch.stack(terms).sum() if terms else None


def _row(edge: Edge | None, name: str) -> list[Tensor]:
    return [edge[name][None].detach()] if edge and name in edge else []
