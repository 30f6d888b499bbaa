"""How long training takes."""

from statistics import median
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from typing_extensions import override


class EpochTimer(Callback):
    """Measures the training and each of its epochs; a run that goes on from a checkpoint adds to what it finds there.

    Attributes:
        epoch_s: seconds of each epoch's training batches, without validation, checkpoints and figures.
        epoch_samples: the number of samples in each of them.
    """

    def __init__(self) -> None:
        self.epoch_s: list[float] = []
        self.epoch_samples: list[int] = []
        self._before_s = 0.0
        self._samples = 0
        self._epoch_started = self._last_batch = 0.0
        self._earlier: dict[str, Any] | None = None
        self._started: float | None = None
        self._ended: float | None = None

    @property
    def fit_s(self) -> float:
        """Seconds of the whole training so far, with all that belongs to it."""
        if self._started is None:
            return self._before_s
        return self._before_s + (self._ended or perf_counter()) - self._started

    def metrics(self) -> dict[str, float]:
        """``time/fit_s``, and the medians over the epochs ``time/epoch_s`` and ``throughput/samples_per_s``."""
        if not self.epoch_s:
            return {"time/fit_s": self.fit_s}
        rates = [n / s for n, s in zip(self.epoch_samples, self.epoch_s, strict=True)]
        return {
            "time/fit_s": self.fit_s,
            "time/epoch_s": median(self.epoch_s),
            "throughput/samples_per_s": median(rates),
        }

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        earlier, self._earlier = self._earlier, None
        if earlier is not None:
            self._before_s = earlier["fit_s"]
            self.epoch_s, self.epoch_samples = list(earlier["epoch_s"]), list(earlier["epoch_samples"])
        self._started, self._ended = perf_counter(), None
        # An epoch that is gone on with in the middle begins without `on_train_epoch_start`.
        self._begin_epoch()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin_epoch()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch[1])
        if trainer.is_last_batch and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        # The clock stops with the last batch: validation and other callbacks come before the epoch's end.
        self._last_batch = perf_counter()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._samples:
            self.epoch_s.append(self._last_batch - self._epoch_started)
            self.epoch_samples.append(self._samples)
            pl_module.log("time/epoch_s", self.epoch_s[-1])

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended = perf_counter()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fit_s": self.fit_s, "epoch_s": self.epoch_s, "epoch_samples": self.epoch_samples}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning loads states for a test as well; only a training takes it over.
        self._earlier = state_dict

    def _begin_epoch(self) -> None:
        self._epoch_started = self._last_batch = perf_counter()
        self._samples = 0
