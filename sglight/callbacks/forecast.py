"""How long a training will take, said once its first batches are through."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from sglight.callbacks.console import seconds

# The first batch, in which much is made for the first time, does not count; then at least so many and so long.
LEAST_BATCHES, LEAST_S = 4, 3.0


class Forecast(Callback):
    """Prints once what an epoch will take by its first batches; of an epoch that is over sooner it says nothing."""

    def __init__(self) -> None:
        self._told = False
        self._counted, self._since = -1, 0.0

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._counted = -1

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._told:
            return
        self._counted += 1
        if self._counted == 0:
            self._since = perf_counter()
            return
        passed = perf_counter() - self._since
        if self._counted >= LEAST_BATCHES and passed >= LEAST_S and not trainer.is_last_batch:
            self._told = True
            if trainer.is_global_zero:
                epochs = (trainer.max_epochs or 0) - trainer.current_epoch
                print(forecast(passed / self._counted, int(trainer.num_training_batches), epochs))


def forecast(batch_s: float, batches: int, epochs: int) -> str:
    """A sentence: what an epoch of ``batches`` will take at ``batch_s`` each, and all that are left if several."""
    epoch_s = batch_s * batches
    rest = f", all {epochs} about {seconds(epoch_s * epochs)}" if epochs > 1 else ""
    return f"an epoch will take about {seconds(epoch_s)} ({seconds(batch_s)} a batch){rest}, validation not counted"
