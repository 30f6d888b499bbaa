"""The outer loop of parallel variable distribution."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from sglight.strategies.pvd import PVD


class PVDLoop(Callback):
    """Makes an epoch of a `PVD` an iteration: directions, local steps on the batches, synchronisation.

    Give it to the Trainer before callbacks that are to see the network that an iteration has led to. It synchronises
    behind the epoch's last batch, before the validation; and stops the training when the module is done.
    """

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PVD), f"PVDLoop iterates PVD, not {type(pl_module).__name__}"

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not at the beginning of the epoch: one that is gone on with in the middle has none.
        assert isinstance(pl_module, PVD)
        if pl_module.iteration is None:
            pl_module.begin_iteration()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PVD)
        if trainer.is_last_batch:
            pl_module.end_iteration()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, PVD)
        if pl_module.is_done():
            trainer.should_stop = True
