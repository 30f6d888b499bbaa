"""Private parts of Lightning that we lean on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.data import sized_len
from pytorch_lightning.strategies.launchers.launcher import _Launcher
from pytorch_lightning.utilities import rank_zero_only

Launcher = _Launcher  # what the launcher of a Strategy derives from


def leave_signals(trainer: pl.Trainer) -> None:
    """Keep a Trainer from answering SIGTERM itself: it would end the process with status 0, and wait for others."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def count_batches(trainer: pl.Trainer, batches: int) -> None:
    """Make `Trainer.global_step` the number of batches.

    With manual optimisation Lightning counts an optimiser's steps there, of whichever optimisers step through its own
    wrappers. Ours step without these, and this counts.
    """
    progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
    while progress.total.completed < batches:
        progress.increment_ready()
        progress.increment_completed()


def batches_in_loader(trainer: pl.Trainer) -> int | None:
    """Batches that the training loader has, when optimisers are configured; None if it does not know.

    Not from `Trainer.estimated_stepping_batches`: that makes the loader, and Lightning then forgets to tell it at which
    batch a training goes on in mid-epoch.
    """
    loader: Any = trainer.fit_loop._data_source.dataloader()
    return sized_len(loader)


def batch_size(trainer: pl.Trainer) -> int | None:
    """The batch size of the training data, if the data module or the loader tells it."""
    source: Any = getattr(trainer, "datamodule", None) or trainer.fit_loop._data_source.instance
    size = getattr(source, "batch_size", None)
    return size if isinstance(size, int) else None


def batches_processed(trainer: pl.Trainer) -> int:
    """How many batches of this epoch are trained; more may have been taken from the loader."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(progress.processed)


def epochs_done(checkpoint: Mapping[str, Any]) -> int:
    """How many epochs a checkpoint has behind it, those of which only the last batch is done included."""
    loop = checkpoint["loops"]["fit_loop"]
    return int(checkpoint["epoch"]) + bool(loop["epoch_loop.batch_progress"]["is_last_batch"])


def set_rank(rank: int) -> None:
    """Give this process its number for `rank_zero_only`, which otherwise guesses it from the environment."""
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
