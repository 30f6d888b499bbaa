"""Small objectives and short trainings for the tests of parallel variable distribution."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sglight.link import alone
from sglight.networks import StableNet
from sglight.strategies.loss import Loss
from sglight.strategies.pvd import PVD
from sglight.strategies.pvd.objective import Objective, Point, flat
from sglight.strategies.pvd.sharing import SharedObjective
from sglight.strategies.recorder import Recorder
from tests.strategies.common import batches, fit

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


class Reports(Callback):
    """Keeps what each iteration has come to, and the weights after it."""

    def __init__(self) -> None:
        self.reports: list[dict[str, float]] = []
        self.points: list[torch.Tensor] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.reports.append(pl_module.report)
        self.points.append(flat([p.detach() for p in pl_module.parameters()]))


def iterate(module: PVD, data: Any, epochs: int, **options: Any) -> tuple[Reports, pl.Trainer]:
    """Train, and tell what each iteration reports."""
    watch = Reports()
    callbacks = [*options.pop("callbacks", []), watch]
    return watch, fit(module, data, epochs, callbacks=callbacks, **options)
