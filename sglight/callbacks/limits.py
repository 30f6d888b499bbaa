"""Ends a training before its last epoch: when its time is over, or when it diverges."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, Timer
from pytorch_lightning.trainer.states import TrainerFn
from typing_extensions import override

from sglight.errors import Diverged
from sglight.strategies.staged import StagedModule

REMEDY = "lower strategy.optimizer.lr or model.horizon, or set strategy.clip_norm"
EXPLODED = 1e6  # a loss so many times as large as the first epoch's is warned of


class TimeLimit(Timer):
    """Lightning's `Timer`, but a resumed run has the full time again."""

    def __init__(self, duration: str) -> None:
        super().__init__(duration)

    @property
    def is_over(self) -> bool:
        """Whether the time is over."""
        left = self.time_remaining()
        return left is not None and left <= 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Divergence(Callback):
    """Ends a training whose loss or weights are not finite, before they are written to a checkpoint.

    Warns if the loss has grown by a factor of a million.

    Raises:
        Diverged: with the batch or epoch in which it was found.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._warned = False

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StagedModule)
        # Not in PVD, whose processors may try, and reject, steps to where the loss is infinite. Not at every batch on a
        # GPU, which would have to wait for it.
        every = trainer.log_every_n_steps if pl_module.device.type == "cuda" else 1  # type: ignore[attr-defined]
        if pl_module.part != "stage" or (batch_idx + 1) % max(every, 1):
            return
        if not math.isfinite(loss := pl_module.runtime.means.epoch.sum_of_losses()):
            raise Diverged(f"the loss is {loss} in {_place(trainer, batch_idx)}; {REMEDY}")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loss = float(trainer.callback_metrics.get("val/loss", 0.0))
        if trainer.state.fn == TrainerFn.FITTING and not math.isfinite(loss):
            raise Diverged(f"val/loss is {loss} after epoch {trainer.current_epoch}; {REMEDY}")

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not all(bool(p.isfinite().all()) for p in pl_module.parameters()):
            raise Diverged(f"weights are not finite after epoch {trainer.current_epoch}; {REMEDY}")
        if "train/loss" not in trainer.callback_metrics:
            return
        loss = float(trainer.callback_metrics["train/loss"])
        self._first = loss if self._first is None else self._first
        if loss > EXPLODED * max(self._first, 1e-9) and not self._warned:
            self._warned = True
            warnings.warn(
                f"the loss has grown from {self._first:g} to {loss:g} by epoch {trainer.current_epoch}; {REMEDY}",
                stacklevel=2,
            )


def _place(trainer: pl.Trainer, batch: int) -> str:
    return f"batch {batch} of epoch {trainer.current_epoch}"
