"""The outer loop of parallel variable distribution."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override


@runtime_checkable
class Iterating(Protocol):
    """What `PVDLoop` iterates: a module such as `PVD`."""

    @property
    def iterating(self) -> bool:
        """Whether an iteration is under way."""

    def begin_iteration(self) -> None:
        """Before the first batch."""

    def end_iteration(self) -> None:
        """Behind the last batch."""

    def is_done(self) -> bool:
        """Whether the training may end."""


class PVDLoop(Callback):
    """Makes an epoch of a `PVD` an iteration: directions, local steps on the batches, synchronisation.

    It synchronises behind the epoch's last batch, before the validation, and stops the training when the module is
    done. The module brings it along. Other modules are left alone: a Trainer keeps the callbacks of a module that it
    has trained.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Lightning puts a module's callbacks behind the Trainer's own, which are to see the weights of an iteration's
        # end (and not of its beginning). Its `_reorder_callbacks` ran before; those that follow keep their order.
        own: Any = trainer  # it does not declare the attribute
        own.callbacks = [self, *(callback for callback in own.callbacks if callback is not self)]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not at the beginning of the epoch: one that is gone on with in the middle has none.
        if isinstance(pl_module, Iterating) and not pl_module.iterating:
            pl_module.begin_iteration()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_last_batch and isinstance(pl_module, Iterating) and pl_module.iterating:
            pl_module.end_iteration()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(pl_module, Iterating) and pl_module.is_done():
            trainer.should_stop = True
