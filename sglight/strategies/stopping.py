"""Early stopping of a training that has several levels: it is a level that stops."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from typing_extensions import override

# A finer network may do better where a coarse one no longer learns or is good enough, not where it diverges.
DONE = {EarlyStoppingReason.PATIENCE_EXHAUSTED, EarlyStoppingReason.STOPPING_THRESHOLD}
DIVERGED = {EarlyStoppingReason.NON_FINITE_METRIC, EarlyStoppingReason.DIVERGENCE_THRESHOLD}


class NextLevel(EarlyStopping):
    """Goes on with the next level of a `Multilevel` where Lightning's `EarlyStopping` would end the training.

    It monitors nothing itself, and is an `EarlyStopping` in order to be asked behind all others; `attach` it before
    callbacks that write checkpoints.
    """

    def __init__(self) -> None:
        super().__init__("level")

    @classmethod
    def attach(cls, trainer: pl.Trainer) -> None:
        """Give it to a Trainer, once."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(each, cls) for each in callbacks):
            savers = (k for k, each in enumerate(callbacks) if isinstance(each, Checkpoint))
            callbacks.insert(next(savers, len(callbacks)), cls())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._go_on(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._go_on(trainer, pl_module)

    def _go_on(self, trainer: pl.Trainer, module: Any) -> None:
        if not trainer.should_stop or module.is_finest or module.told_to_stop:
            return
        reasons = {each.stopping_reason for each in trainer.early_stopping_callbacks}
        if reasons & DONE and not reasons & DIVERGED:
            trainer.should_stop = False
            module.end_level()


def begin_anew(stopping: EarlyStopping) -> None:
    """Forget what was monitored: it is of another network."""
    stopping.wait_count = stopping.stopped_epoch = 0
    stopping.best_score = torch.tensor(torch.inf if stopping.mode == "min" else -torch.inf)
    stopping.stopping_reason = EarlyStoppingReason.NOT_STOPPED
    stopping.stopping_reason_message = None
