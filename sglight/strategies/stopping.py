"""Early stopping of a training with several levels: it ends the present level, not the training."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, EarlyStopping
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason
from typing_extensions import override

# For these reasons only the level ends. A finer network may still do better, unless the training diverges.
DONE = {EarlyStoppingReason.PATIENCE_EXHAUSTED, EarlyStoppingReason.STOPPING_THRESHOLD}
DIVERGED = {EarlyStoppingReason.NON_FINITE_METRIC, EarlyStoppingReason.DIVERGENCE_THRESHOLD}


class NextLevel(EarlyStopping):
    """Continues a `Multilevel` training with the next level when Lightning's `EarlyStopping` would end it.

    It monitors nothing itself. It is an `EarlyStopping` because Lightning calls these callbacks after all others.
    """

    def __init__(self) -> None:
        super().__init__("level")

    @classmethod
    def attach(cls, trainer: pl.Trainer) -> None:
        """Adds it to a Trainer, once, before the callbacks that write checkpoints."""
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
        self._end_level_instead(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._end_level_instead(trainer, pl_module)

    def _end_level_instead(self, trainer: pl.Trainer, module: Any) -> None:
        """If early stopping has ended the training at a coarse level, ends that level instead."""
        if not trainer.should_stop or module.is_finest or module.stop_requested:
            return
        reasons = {each.stopping_reason for each in trainer.early_stopping_callbacks}
        if reasons & DONE and not reasons & DIVERGED:
            trainer.should_stop = False
            module.end_level()


def begin_anew(stopping: EarlyStopping) -> None:
    """Resets early stopping, because the values that it monitored are those of a coarser network."""
    stopping.wait_count = stopping.stopped_epoch = 0
    stopping.best_score = torch.tensor(torch.inf if stopping.mode == "min" else -torch.inf)
    stopping.stopping_reason = EarlyStoppingReason.NOT_STOPPED
    stopping.stopping_reason_message = None
