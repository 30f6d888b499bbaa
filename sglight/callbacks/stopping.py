"""When to stop early."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping
from typing_extensions import override


class FinestStopping(EarlyStopping):
    """Lightning's `EarlyStopping`, for the network that is asked for: a coarser one is trained to its last epoch."""

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.is_finest:
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if pl_module.is_finest:
            super().on_validation_end(trainer, pl_module)
