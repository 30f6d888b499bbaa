"""Checks that a network fits the shape of its samples; imports no torch, so that mistakes are found early."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any


def check_shapes(
    shape: Sequence[int], kernel: str, widths: Sequence[int], opening: str, connector: str, pool: bool
) -> None:
    """Refuse a network that cannot take samples of ``shape`` ``[C, H, W]`` or ``[C]``.

    Args:
        shape: of one sample.
        kernel, opening, connector, pool: the keys of ``model`` with these names.
        widths: ``model.channels``, one for each segment.

    Raises:
        ValueError: that names the key to change.
    """
    conv = kernel == "conv"
    if conv and len(shape) != 3:
        raise ValueError(
            f"model.kernel=conv needs images, not samples of shape {tuple(shape)}; use model.kernel=dense"
        )
    if opening == "conv" and not conv:
        raise ValueError("model.opening=conv needs model.kernel=conv; use model.opening=linear")
    inputs = shape[0] if conv else math.prod(shape)
    if opening in ("pad", "repeat") and inputs > widths[0]:
        raise ValueError(
            f"model.opening={opening} needs a width of at least the input's {inputs}, but model.channels "
            f"begins with {widths[0]}; widen it, or use model.opening=linear"
        )
    for before, after in pairwise(widths):
        if connector == "pad" and after < before:
            raise ValueError(
                f"model.connector=pad cannot narrow {before} channels to {after}; use model.connector=linear"
            )
    if conv and pool and min(shape[1:]) < 2 ** (len(widths) - 1):
        raise ValueError(
            f"model.channels has {len(widths)} entries, but images of {shape[1]}x{shape[2]} are too "
            "small to be halved between that many segments; use fewer, or model.pool=false"
        )


def check_filters(shape: Sequence[int], model: Mapping[str, Any], strategy: Mapping[str, Any]) -> None:
    """Refuse convolution filters that are larger than the pictures.

    Args:
        shape: of one sample.
        model, strategy: the config groups of these names.

    Raises:
        ValueError: that names the key to change.
    """
    if model["kernel"] != "conv" or len(shape) != 3:
        return
    estimator = strategy.get("estimator") or {}
    sizes = {"model.kernel_size": model["kernel_size"]}
    if estimator.get("name") == "conv":
        sizes["strategy.estimator.kernel_size"] = estimator["kernel_size"]
    for key, size in sizes.items():
        if size > min(shape[1:]):
            raise ValueError(f"{key}={size} is larger than the pictures, {shape[1]} x {shape[2]}; lower it")
