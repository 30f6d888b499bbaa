"""The outer loop of parallel variable distribution."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override


@runtime_checkable
class Iterating(Protocol):
    """A module whose epochs are iterations, such as `PVD`."""

    @property
    def iterating(self) -> bool:
        """Whether an iteration has begun and not ended."""

    def begin_iteration(self) -> None:
        """Called before the first batch."""

    def end_iteration(self) -> None:
        """Called after the last batch."""

    def is_done(self) -> bool:
        """Whether the training should end."""


class PVDLoop(Callback):
    """Makes each epoch of a `PVD` module an iteration: directions, local steps on the batches, synchronisation.

    The synchronisation comes after the last batch and before the validation. The training is stopped when the module is
    done. `PVD` adds this callback by itself. It ignores other modules, because a Trainer keeps the callbacks of a
    module that it has trained.
    """

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # First in the list, although Lightning adds a module's callbacks last, so that the others see the weights at
        # the end of an iteration. Lightning has already sorted the list.
        own: Any = trainer  # it does not declare the attribute
        own.callbacks = [self, *(callback for callback in own.callbacks if callback is not self)]

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Not in `on_train_epoch_start`, which is not called when an epoch is resumed in the middle.
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
