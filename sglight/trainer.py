"""Lightning's Trainer, its callbacks and its logger, from a run's config."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from typing_extensions import override

from sglight.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from sglight.callbacks.console import PROFILE
from sglight.callbacks.figures import PlanarFigures
from sglight.callbacks.forecast import Forecast
from sglight.callbacks.gradient_quality import GradientQuality
from sglight.callbacks.limits import Divergence, TimeLimit
from sglight.callbacks.record import PatientStopping
from sglight.callbacks.stability import StabilityMonitor
from sglight.callbacks.timeline import Timeline
from sglight.compat.lightning import leave_signals
from sglight.errors import UserError
from sglight.parallel.strategy import StageStrategy

# Keys of trainer.* that are ours, or that need translation, before the rest goes to Lightning's Trainer.
OWN_TRAINER_KEYS = ("threads", "idle_timeout_s", "share_devices", "show_schedule", "max_time")


PROFILERS: dict[str, Any] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


def build_callbacks(
    config: Mapping[str, Any], folder: Path, max_time: str | None = None
) -> tuple[BestCheckpoint, list[Callback]]:
    """The checkpoint of the best epoch, and all callbacks that the config asks for."""
    checkpoint, stopping = config["checkpoint"], config["early_stopping"]
    best = BestCheckpoint(folder / "checkpoints", checkpoint["monitor"], checkpoint["mode"])
    last = LastCheckpoint(folder / "checkpoints", checkpoint["every_n_epochs"])
    callbacks: list[Callback] = [Divergence(), Forecast()]
    if max_time is not None:
        callbacks.append(TimeLimit(max_time))
    if stopping["enabled"]:
        settings = {key: stopping[key] for key in ("monitor", "mode", "patience")}
        callbacks.append(PatientStopping(**settings))
    if config["lr_monitor"]["enabled"]:
        callbacks.append(LearningRateMonitor("epoch"))
    if config["figures"]["enabled"]:
        callbacks.append(PlanarFigures(folder / "figures", config["figures"]["every_n_epochs"]))
    if config["gradient_quality"]["enabled"]:
        callbacks.append(GradientQuality(folder / "figures"))
    if config["timeline"]["enabled"]:
        callbacks.append(Timeline(folder, config["timeline"]["batches"]))
    if config["stability"]["enabled"]:
        settings = {key: value for key, value in config["stability"].items() if key != "enabled"}
        callbacks.append(StabilityMonitor(folder / "figures", **settings))
    if config["progress"]["enabled"]:
        callbacks.append(RichProgressBar(config["progress"]["refresh_rate"]))
    return best, [*callbacks, best, last]


def build_trainer(
    plain: Mapping[str, Any], folder: Path, callbacks: list[Callback], batches_before: int = 0
) -> pl.Trainer:
    """Lightning's Trainer for ``trainer``, ``logger`` and these callbacks.

    Args:
        batches_before: those of a training that goes on; what is logged of them stays.
    """
    config = {k: v for k, v in plain["trainer"].items() if v is not None and k not in OWN_TRAINER_KEYS}
    bar = any(isinstance(callback, RichProgressBar) for callback in callbacks)
    config["enable_progress_bar"] = config["enable_progress_bar"] and bar
    if not config["enable_progress_bar"]:
        callbacks = [callback for callback in callbacks if not isinstance(callback, RichProgressBar)]
    if plain["logger"]["name"] == "none":
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    if config.get("fast_dev_run"):
        # A dev run writes nothing.
        callbacks = [
            c for c in callbacks if not isinstance(c, BestCheckpoint | LastCheckpoint | LearningRateMonitor)
        ]
    config |= _workers(plain["trainer"])
    if (name := config.get("profiler")) is not None:
        config["profiler"] = PROFILERS[name](dirpath=folder, filename=PROFILE)
    try:
        trainer = pl.Trainer(
            **config,
            callbacks=callbacks,
            logger=_logger(plain["logger"]["name"], folder, batches_before),
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


def _workers(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """Lightning's Strategy and devices for several workers.

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
    return {"strategy": StageStrategy(workers=workers), "devices": devices}


def uses_gpu(accelerator: str) -> bool:
    """Whether an accelerator, by its name in ``trainer``, is a GPU on this machine."""
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def _logger(name: str, folder: Path, batches_before: int) -> Logger | bool:
    if name == "tensorboard":
        return TensorBoardLogger(folder, name=None, version="", default_hp_metric=False)
    if name == "csv":
        return KeptCSVLogger(folder, batches_before)
    return False


class KeptCSVLogger(CSVLogger):
    """Lightning's, which keeps what a run's folder has of the batches before those that it logs.

    Args:
        folder: of the run. batches_before: how many batches these are.
    """

    def __init__(self, folder: Path, batches_before: int) -> None:
        super().__init__(folder, name="", version="")
        self._kept = list(_rows_before(folder / "metrics.csv", batches_before))

    @property
    @override
    def experiment(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that earlier files are deleted
            writer = super().experiment
        kept, self._kept = self._kept, []
        if kept and hasattr(writer, "metrics"):  # not on other workers
            writer.metrics[:0] = kept
        return writer


def _rows_before(path: Path, batches: int) -> Iterator[dict[str, Any]]:
    if batches and path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if (row.get("step") or "").isdigit() and int(row["step"]) < batches:
                    yield {key: value for key, value in row.items() if key and value}
