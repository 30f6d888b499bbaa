"""How much memory the weights of a network take, before anybody asks the system for it; imports no torch."""

from __future__ import annotations

import os

from omegaconf import DictConfig, ListConfig

from sglight.errors import UserError

COPIES = 4  # parameter, gradient, and two moments of an optimiser
BYTES = 4  # of a number
UNITS = ((1e18, "EB"), (1e15, "PB"), (1e12, "TB"), (1e9, "GB"))


def check_room(cfg: DictConfig) -> None:
    """Refuse a network whose weights alone are more than the memory of the machines.

    Raises:
        UserError: that says how much it would take.
    """
    needed, there = weight_bytes(cfg.model), memory_bytes() * cfg.trainer.num_nodes
    if needed > there:
        raise UserError(
            f"model.channels={cfg.model.channels} with model.steps={cfg.model.steps} would take {_size(needed)} for "
            f"weights, gradients and moments, and there are {_size(there)} of memory; lower model.channels or "
            "model.steps"
        )


def weight_bytes(model: DictConfig) -> float:
    """What the time steps' weights, their gradients and an optimiser's moments take."""
    widths = _list(model.channels)
    steps = _list(model.steps)
    steps = steps * len(widths) if len(steps) == 1 else steps
    filters = model.kernel_size**2 if model.kernel == "conv" else 1
    numbers = sum(float(n) * width * width * filters for n, width in zip(steps, widths, strict=True))
    return COPIES * BYTES * numbers


def memory_bytes() -> float:
    """The memory of this machine; without end if nobody knows."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return float("inf")


def _list(value: int | ListConfig) -> list[int]:
    return list(value) if isinstance(value, ListConfig) else [value]


def _size(count: float) -> str:
    for unit, name in UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e6:.3g} MB"
