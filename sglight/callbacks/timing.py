"""Measures how long the training takes."""

from statistics import median
from time import perf_counter, process_time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from typing_extensions import override

from sglight.strategies.staged import StagedModule

# What `EpochTimer` measures for each epoch, in seconds.
PARTS = ("epoch_s", "validation_s", "overhead_s")


class EpochTimer(Callback):
    """Measures the time of the training and of each epoch. A resumed run continues the counts of its checkpoint.

    Args:
        curves: whether to log these times.

    Attributes:
        epoch_s: for each epoch, the seconds of its training batches, without validation, checkpoints and figures.
        epoch_samples: for each epoch, the number of samples.
        validation_s: the seconds of each validation.
        overhead_s: the seconds between the batches of two epochs without the validation: checkpoints, figures etc.
        cpu_s: CPU seconds of all workers together.
    """

    def __init__(self, curves: bool = True) -> None:
        self.curves = curves
        self.epoch_s: list[float] = []
        self.epoch_samples: list[int] = []
        self.validation_s: list[float] = []
        self.overhead_s: list[float] = []
        self.cpu_s = 0.0
        self._cpu_counted = 0.0  # the CPU clock of this process when `cpu_s` was last updated
        self._validation_started = 0.0
        self._validating = 0.0  # seconds of validation since the last batch
        self._between = False
        self._before_s = 0.0
        self._samples = 0
        self._epoch_started = self._last_batch = 0.0
        self._earlier: dict[str, Any] | None = None
        self._started: float | None = None
        self._ended: float | None = None

    @property
    def fit_s(self) -> float:
        """Seconds of the whole training so far, with validation and everything else."""
        if self._started is None:
            return self._before_s
        return self._before_s + (self._ended or perf_counter()) - self._started

    def metrics(self) -> dict[str, float]:
        """``time/fit_s`` and ``time/cpu_s``; medians over the epochs: ``time/*_s``, ``throughput/samples_per_s``."""
        medians = {f"time/{name}": median(seconds) for name in PARTS if (seconds := getattr(self, name))}
        rates = [n / s for n, s in zip(self.epoch_samples, self.epoch_s, strict=True)]
        throughput = {"throughput/samples_per_s": median(rates)} if rates else {}
        return {"time/fit_s": self.fit_s, "time/cpu_s": self.cpu_s, **medians, **throughput}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._earlier is None and trainer.global_step:  # an earlier training by this Trainer
            self._earlier = self.state_dict()
        self.take_over()
        self._started, self._ended, self._cpu_counted = perf_counter(), None, process_time()
        # An epoch that is resumed in the middle begins without `on_train_epoch_start`.
        self._begin_epoch()

    def take_over(self) -> None:
        """Continues the counts of the checkpoint that was loaded."""
        earlier = self._earlier or {}  # another version may have written less
        self._earlier = None
        self._before_s, self.cpu_s = earlier.get("fit_s", 0.0), earlier.get("cpu_s", 0.0)
        for name in (*PARTS, "epoch_samples"):
            setattr(self, name, list(earlier.get(name, [])))
        if len(self.epoch_s) != len(self.epoch_samples):
            self.epoch_s, self.epoch_samples = [], []

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_epoch(trainer)
        self._begin_epoch()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples += len(batch[1])
        if trainer.is_last_batch and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        # The end of the last batch, because validation and other callbacks come before the end of the epoch.
        self._last_batch = perf_counter()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation_started = perf_counter()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # not for `Trainer.validate`
            self.validation_s.append(perf_counter() - self._validation_started)
            self._validating += self.validation_s[-1]

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._count_cpu(pl_module)
        if self._samples:
            self._between = True
            self.epoch_s.append(self._last_batch - self._epoch_started)
            self.epoch_samples.append(self._samples)
            if self.curves:
                pl_module.log("time/epoch_s", self.epoch_s[-1])
                if self._validating:
                    pl_module.log("time/validation_s", self._validating)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_epoch(trainer)
        self._count_cpu(pl_module)
        self._ended = perf_counter()

    @override
    def state_dict(self) -> dict[str, Any]:
        lists = {name: getattr(self, name) for name in (*PARTS, "epoch_samples")}
        return {"fit_s": self.fit_s, "cpu_s": self.cpu_s, **lists}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Only kept here: Lightning loads states for a test as well, but only a training uses them.
        self._earlier = state_dict

    def _count_cpu(self, module: pl.LightningModule) -> None:
        assert isinstance(module, StagedModule)
        before, self._cpu_counted = self._cpu_counted, process_time()
        self.cpu_s += module.placement.peers.total([self._cpu_counted - before]).result()[0]

    def _begin_epoch(self) -> None:
        self._epoch_started = self._last_batch = perf_counter()
        self._samples, self._validating = 0, 0.0

    def _end_epoch(self, trainer: pl.Trainer) -> None:
        """Logs the overhead after the batches of an epoch, when all of it is over."""
        if self._between:
            self._between = False
            self.overhead_s.append(max(perf_counter() - self._last_batch - self._validating, 0.0))
            for logger in trainer.loggers if self.curves else ():
                logger.log_metrics({"time/overhead_s": self.overhead_s[-1]}, trainer.global_step - 1)
