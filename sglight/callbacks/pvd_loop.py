"""The outer loop of parallel variable distribution."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from sglight.errors import UserError
from sglight.strategies.pvd import PVD


class PVDLoop(Callback):
    """Makes an epoch of a `PVD` an iteration: directions, local steps on the batches, synchronisation.

    Give it to the Trainer before callbacks that are to see the network that an iteration has led to. It synchronises
    behind the epoch's last batch, before the validation; and stops the training when the module is done.
    """

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not at the beginning of the epoch: one that is gone on with in the middle has none.
        if pvd(pl_module).iteration is None:
            pvd(pl_module).begin_iteration()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch:
            pvd(pl_module).end_iteration()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pvd(pl_module).is_done():
            trainer.should_stop = True


def pvd(module: pl.LightningModule) -> PVD:
    """The module, if it is one to iterate."""
    if not isinstance(module, PVD):
        raise UserError(f"PVDLoop iterates the strategy PVD, not {type(module).__name__}")
    return module
