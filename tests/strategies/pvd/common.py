"""Small objectives for the tests of parallel variable distribution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sglight.link import alone
from sglight.networks import StableNet
from sglight.strategies.loss import Loss
from sglight.strategies.pvd.objective import Objective, Point
from sglight.strategies.pvd.sharing import SharedObjective
from sglight.strategies.recorder import Recorder
from tests.strategies.common import batches

SMOOTH = {"smoothness": 0.1}


def samples(network: dict[str, Any]) -> tuple[Tensor, Tensor]:
    ((x, y),) = batches(1, size=20, shape=network["shape"])
    return x, y


def objective(network: dict[str, Any], parts: int = 3, loss: Loss | None = None) -> Objective:
    return Objective(StableNet(**network).split(parts), loss or Loss(), SMOOTH, 0.01, Recorder())


def shared(
    network: dict[str, Any], parts: int = 3, largest: int = 4, loss: Loss | None = None
) -> SharedObjective:
    found = SharedObjective(objective(network, parts, loss), alone(parts), parts, Recorder())
    found.use(samples(network), largest)
    found.forget()
    return found


def point(seed: int, sizes: tuple[int, ...] = (3, 2, 4)) -> Point:
    """A point with blocks of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]
