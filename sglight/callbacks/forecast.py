"""Prints how long a training will take, after its first batches."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from sglight.units import plural, seconds

# Measured are at least so many batches and seconds, after the first batch, which is slower than the others.
LEAST_BATCHES, LEAST_S = 4, 3.0


class Forecast(Callback):
    """Prints once how long an epoch will take, measured in its first batches; nothing if it is over before that."""

    def __init__(self) -> None:
        self._printed = False
        self._counted, self._since = -1, 0.0

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._counted = -1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._printed:
            return
        self._counted += 1
        if self._counted == 0:
            self._since = perf_counter()
            return
        passed = perf_counter() - self._since
        if self._counted >= LEAST_BATCHES and passed >= LEAST_S and not trainer.is_last_batch:
            self._printed = True
            if trainer.is_global_zero:
                epochs = (trainer.max_epochs or 0) - trainer.current_epoch
                print(forecast(passed / self._counted, int(trainer.num_training_batches), epochs))


def forecast(batch_s: float, batches: int, epochs: int) -> str:
    """A sentence about the time that an epoch, and all epochs that are left, will take.

    Args:
        batch_s: seconds for a batch.
        batches: in an epoch.
        epochs: that are left.

    >>> forecast(0.1, 100, 3)
    'an epoch will take about 10.0 s (100 ms a batch), 3 epochs about 30.0 s, without validation'
    """
    epoch_s = batch_s * batches
    rest = f", {plural(epochs, 'epoch')} about {seconds(epoch_s * epochs)}" if epochs > 1 else ""
    return (
        f"an epoch will take about {seconds(epoch_s)} ({seconds(batch_s)} a batch){rest}, without validation"
    )
