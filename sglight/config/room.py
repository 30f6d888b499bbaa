"""Checks that the weights of a network fit into the memory, before it is allocated; imports no torch."""

from __future__ import annotations

import os

from omegaconf import DictConfig, ListConfig

from sglight import units
from sglight.errors import UserError

COPIES = 4  # parameter, gradient, and two moments of an optimiser
BYTES = 4  # of a number


def check_room(cfg: DictConfig) -> None:
    """Refuse a network whose weights alone are more than the memory of the machines.

    Raises:
        UserError: that says how much it would take.
    """
    needed, there = weight_bytes(cfg.model), memory_bytes() * cfg.trainer.num_nodes
    if needed > there:
        raise UserError(
            f"model.channels={cfg.model.channels} with model.steps={cfg.model.steps} would take {units.size(needed)} "
            f"for weights, gradients and moments, and there are {units.size(there)} of memory; lower model.channels or "
            "model.steps"
        )


def weight_bytes(model: DictConfig) -> float:
    """The bytes of the weights of all time steps, their gradients and two moments of an optimiser."""
    widths = _list(model.channels)
    steps = _list(model.steps)
    steps = steps * len(widths) if len(steps) == 1 else steps
    filters = model.kernel_size**2 if model.kernel == "conv" else 1
    numbers = sum(float(n) * width * width * filters for n, width in zip(steps, widths, strict=True))
    return COPIES * BYTES * numbers


def memory_bytes() -> float:
    """The bytes of memory of this machine; infinity if they cannot be found."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def _list(value: int | ListConfig) -> list[int]:
    return list(value) if isinstance(value, ListConfig) else [value]
