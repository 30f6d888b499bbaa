"""Private parts of Lightning that sglight depends on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.data import sized_len
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies.launchers.launcher import _Launcher
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultMetric
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

Launcher = _Launcher  # the base class of the launcher of a Lightning strategy


class RedirectedCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, of which a subclass may change how a file is written: see `write_checkpoint`."""

    @override
    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        self.write_checkpoint(trainer, filepath)
        self._last_checkpoint_saved = filepath

    def write_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        """Write the checkpoint; a subclass may call this with another path, and move the file."""
        super()._save_checkpoint(trainer, filepath)

    def forget_step(self) -> None:
        """Forget at which step the last checkpoint was written, for another training with the same callback."""
        self._last_global_step_saved = 0


def trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    """The Trainer of a module; None if it has none, where `LightningModule.trainer` would raise an error."""
    trainer: pl.Trainer | None = module._trainer
    return trainer


def leave_signals(trainer: pl.Trainer) -> None:
    """Stop a Trainer from handling SIGTERM: it would wait for other processes and end this one with status 0."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def count_batches(trainer: pl.Trainer, batches: int) -> None:
    """Make `Trainer.global_step` the number of batches.

    With manual optimisation Lightning counts the steps of optimisers that it has wrapped. Ours are not wrapped, so
    without this the count would stay at 0.
    """
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    while progress.total.completed < batches:
        progress.increment_ready()
        progress.increment_completed()


@cache
def log_quickly() -> None:
    """Make `LightningModule.log` leave a value that is on its device already where it is.

    Lightning walks through all that it knows about the value first, at each call: a third of the time of a training of
    a few small batches. Holds for all modules in this process; the logged values are the same.
    """
    move = _ResultMetric.to

    def move_if_elsewhere(self: _ResultMetric, *args: Any, **kwargs: Any) -> _ResultMetric:
        value = getattr(self, "value", None)  # its other tensors move with it
        if args and isinstance(value, Tensor) and value.device == args[0] and not kwargs:
            return self
        return move(self, *args, **kwargs)

    _ResultMetric.to = move_if_elsewhere  # type: ignore[method-assign]


def batches_in_loader(trainer: pl.Trainer) -> int | None:
    """The number of batches of the training loader, while optimisers are configured; None if the loader has no length.

    `Trainer.estimated_stepping_batches` is not used, because it makes Lightning forget at which batch a training that
    was interrupted within an epoch must continue.
    """
    loader: Any = trainer.fit_loop._data_source.dataloader()
    return sized_len(loader)


def batch_size(trainer: pl.Trainer) -> int | None:
    """The batch size of the training data, if the data module or the loader has that attribute; else None."""
    source: Any = getattr(trainer, "datamodule", None) or trainer.fit_loop._data_source.instance
    size = getattr(source, "batch_size", None)
    return size if isinstance(size, int) else None


def batches_processed(trainer: pl.Trainer) -> int:
    """How many batches of this epoch have been trained on; more may have been taken from the loader."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.processed)


def epochs_done(checkpoint: Mapping[str, Any]) -> int:
    """The number of epochs that were complete when a checkpoint was written."""
    loop = checkpoint["loops"]["fit_loop"]
    return int(checkpoint["epoch"]) + bool(loop["epoch_loop.batch_progress"]["is_last_batch"])


def set_rank(rank: int) -> None:
    """Set the rank of this process for `rank_zero_only`, which otherwise guesses it from the environment."""
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
