"""Builds Lightning's Trainer and its callbacks from the config of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, RichProgressBar
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from sglight.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from sglight.callbacks.console import PROFILE
from sglight.callbacks.forecast import Forecast
from sglight.callbacks.limits import Divergence, TimeLimit
from sglight.compat.lightning import leave_signals
from sglight.config.extension import instantiate
from sglight.errors import UserError
from sglight.loggers import build_loggers
from sglight.parallel.strategy import StageStrategy

# Keys of `trainer` that are not passed to Lightning's Trainer.
OWN_TRAINER_KEYS = (
    "threads",
    "idle_timeout_s",
    "share_devices",
    "show_schedule",
    "max_time",
    "replicas",
    "layout",
    "sync_batchnorm",
)


PROFILERS: dict[str, Any] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


def build_callbacks(
    config: Mapping[str, Any], folder: Path, max_time: str | None = None
) -> tuple[BestCheckpoint, list[Callback]]:
    """The callback of the best checkpoint, and all callbacks.

    A node of ``callbacks`` with a ``_target_`` becomes an instance of that class, unless its ``enabled`` is false.

    Args:
        config: the config group ``callbacks``.
        folder: of the run.
        max_time: of ``trainer``.

    Raises:
        UserError: if one cannot be built.
    """
    checkpoint = config["checkpoint"]
    best = BestCheckpoint(folder / "checkpoints", checkpoint["monitor"], checkpoint["mode"])
    last = LastCheckpoint(folder / "checkpoints", checkpoint["every_n_epochs"])
    callbacks: list[Callback] = [Divergence(), Forecast()]
    if max_time is not None:
        callbacks.append(TimeLimit(max_time))
    for name, node in config.items():
        if "_target_" in node and node.get("enabled", True):
            arguments = {key: value for key, value in node.items() if key != "enabled"}
            callbacks.append(instantiate(arguments, f"callbacks.{name}", Callback))
    return best, [*callbacks, best, last]


def results_of(callbacks: Iterable[Callback]) -> dict[str, Any]:
    """The results for ``metrics.json`` of all callbacks that have a method ``metrics()``."""
    found: dict[str, Any] = {}
    for callback in callbacks:
        metrics = getattr(callback, "metrics", None)
        if callable(metrics):
            found |= metrics()
    return found


def build_trainer(
    plain: Mapping[str, Any],
    folder: Path,
    callbacks: list[Callback],
    batches_before: int = 0,
    batches: int | None = None,
) -> pl.Trainer:
    """Lightning's Trainer for the config groups ``trainer`` and ``logger``, and these callbacks.

    Args:
        plain: the config.
        folder: of the run.
        callbacks: for the Trainer.
        batches_before: how many batches were trained before the run was resumed; their logs are kept.
        batches: in an epoch, if known, so that each epoch logs something.

    Raises:
        UserError: if Lightning refuses the settings.
    """
    config = {k: v for k, v in plain["trainer"].items() if v is not None and k not in OWN_TRAINER_KEYS}
    bar = any(isinstance(callback, RichProgressBar) for callback in callbacks)
    config["enable_progress_bar"] = config["enable_progress_bar"] and bar
    if not config["enable_progress_bar"]:
        callbacks = [callback for callback in callbacks if not isinstance(callback, RichProgressBar)]
    if batches is not None:
        config["log_every_n_steps"] = min(config["log_every_n_steps"], batches)
        interval = config.get("val_check_interval")
        if isinstance(interval, int) and interval > batches:
            raise UserError(
                f"trainer.val_check_interval={interval} is more than the {batches} batches of an epoch; give fewer, or "
                "trainer.check_val_every_n_epoch to validate less often"
            )
    if not plain["logger"]:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    if config.get("fast_dev_run"):
        # A dev run writes no checkpoints.
        callbacks = [
            c for c in callbacks if not isinstance(c, BestCheckpoint | LastCheckpoint | LearningRateMonitor)
        ]
    if not config.get("deterministic") and not torch.are_deterministic_algorithms_enabled():
        # To say so once more would import torch's compiler, a third of the start.
        config.pop("deterministic", None)
    config |= _workers(plain["trainer"])
    if (name := config.get("profiler")) is not None:
        config["profiler"] = PROFILERS[name](dirpath=folder, filename=PROFILE)
    try:
        trainer = pl.Trainer(
            **config,
            callbacks=callbacks,
            logger=build_loggers(plain["logger"], folder, batches_before) or False,
            default_root_dir=folder,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        leave_signals(trainer)
        return trainer
    except (MisconfigurationException, ValueError) as error:
        asked = plain["trainer"]
        raise UserError(
            f"trainer.accelerator={asked['accelerator']}, trainer.devices={asked['devices']}, "
            f"trainer.precision={asked['precision']}: {' '.join(str(error).split())} "
            "trainer.accelerator=auto takes the device that is there"
        ) from error


def check_limits(trainer: Mapping[str, Any], datamodule: Any) -> None:
    """Refuse a part of the validation or test batches that is less than one, before anything is trained.

    Raises:
        UserError: that names the key.
    """
    size = getattr(datamodule, "eval_batch_size", None)
    for part, samples in (("val", datamodule.val_size), ("test", datamodule.test_size)):
        # Lightning overfits in the validation too.
        key = "overfit_batches" if part == "val" and trainer["overfit_batches"] else f"limit_{part}_batches"
        limit, batches = trainer[key], ceil(samples / size) if size else 0
        if isinstance(limit, float) and batches and int(batches * limit) < 1:
            raise UserError(
                f"trainer.{key}={limit} is no whole batch of the {batches} that there are; give more, a number of "
                "batches, or a smaller dataset.eval_batch_size"
            )


def _workers(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments ``strategy`` and ``devices`` of the Trainer for several workers.

    Raises:
        UserError: if there are more workers than GPUs.
    """
    workers = trainer["devices"]
    if workers * trainer["num_nodes"] == 1:
        return {}
    devices, on_gpu = workers, uses_gpu(trainer["accelerator"])
    if on_gpu:
        devices = min(workers, torch.cuda.device_count())
        if devices == 0:
            raise UserError(
                f"trainer.accelerator={trainer['accelerator']}, but this machine has no GPU; "
                "use trainer.accelerator=cpu"
            )
        if devices < workers and not trainer["share_devices"]:
            raise UserError(
                f"trainer.devices={workers}, but this machine has {devices} GPU(s): lower it, add "
                "trainer.share_devices=true to let workers take turns, or trainer.accelerator=cpu"
            )
    replicas = {name: trainer[name] for name in ("replicas", "layout", "sync_batchnorm")}
    return {"strategy": StageStrategy(workers=workers, **replicas), "devices": devices}


def uses_gpu(accelerator: str) -> bool:
    """Whether ``trainer.accelerator`` means a GPU on this machine."""
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
