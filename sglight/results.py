"""Trains, validates and tests, and collects the results for ``metrics.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from sglight.callbacks.checkpoint import BestCheckpoint
from sglight.config.machine import processor
from sglight.errors import UserError
from sglight.files import write_atomically
from sglight.origin import Origin
from sglight.report.measures import BACKPROP
from sglight.strategies.staged import StagedModule

HYPERPARAMETERS = (
    "strategy", "strategy.stages", "model.dynamics", "model.kernel", "model.steps", "model.horizon", "model.channels",
    "dataset.name", "dataset.batch_size", "strategy.cuts", "strategy.microbatches", "strategy.slack",
    "strategy.backward", "strategy.lag", "strategy.estimator.name", "strategy.head.name",
    "strategy.head.loss", "strategy.source", "strategy.blend", "strategy.arrival", "strategy.processors",
    "strategy.synchronisation", "strategy.levels", "strategy.prolongation", "strategy.optimizer.name",
    "strategy.optimizer.lr", "trainer.max_epochs", "trainer.precision", "trainer.devices",
    "trainer.replicas",
    "seed",
)  # fmt: skip
# The results on TensorBoard's page of hyperparameters.
COLUMNS = (
    "val/acc", "val/loss", "test/acc", "test/loss", "time/epoch_s", BACKPROP, "memory/peak_bytes",
)  # fmt: skip


def fit(
    trainer: pl.Trainer, module: StagedModule, datamodule: Any, best: BestCheckpoint, start: Origin
) -> dict[str, Any]:
    """Train; returns the metrics, with ``val/*`` of the best epoch and ``val/*_last`` of the last one.

    Raises:
        UserError: if the time was over before the first batch.
    """
    trainer.fit(module, datamodule, ckpt_path=start.ckpt, weights_only=True)
    if trainer.global_step == start.batches:
        raise UserError(
            "trainer.max_time was over before the first batch, and nothing was trained; allow more, or null"
        )
    metrics = logged(trainer, module)
    # The training was stopped before the (refined) network was validated.
    if best.monitor not in metrics or best.validated_level not in (None, module.level):
        trainer.validate(module, datamodule, verbose=False)
        metrics |= logged(trainer, module)
    return _with_best(metrics, best)


def validate(
    trainer: pl.Trainer, module: StagedModule, datamodule: Any, best: BestCheckpoint, start: Origin
) -> dict[str, Any]:
    """The metrics that `fit` returns, for a training that was complete when its process ended."""
    trainer.validate(module, datamodule, ckpt_path=start.ckpt, verbose=False, weights_only=True)
    best.take_over(trainer, start.ckpt)
    before = {"run/epochs": start.epochs, "run/steps": start.batches}
    return _with_best({**start.metrics, **logged(trainer, module), **before}, best)


def test(trainer: pl.Trainer, module: StagedModule, datamodule: Any, ckpt: str | None) -> dict[str, Any]:
    """The metrics of a test of a checkpoint; without one, of the present network."""
    trainer.test(module, datamodule, ckpt_path=ckpt, verbose=False, weights_only=True)
    return logged(trainer, module)


def logged(trainer: pl.Trainer, module: StagedModule) -> dict[str, Any]:
    """The logged metrics, with the numbers of stages, workers, epochs and steps."""
    values = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("lr/")}
    return values | {
        "run/stages": len(module.cuts) - 1,
        "run/workers": trainer.world_size,
        "run/replicas": module.placement.replicas.size,
        "run/epochs": trainer.current_epoch,
        "run/steps": trainer.global_step,
    }


def monitored(metrics: Mapping[str, Any], best: BestCheckpoint) -> float:
    """The value of the metric that makes a checkpoint the best one."""
    score = best.best_model_score
    return float(metrics.get(str(best.monitor), math.nan) if score is None else score)


def as_json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics with None for numbers that are not finite, which JSON does not have.

    >>> as_json({"test/acc": 0.9, "test/loss": math.nan})
    {'test/acc': 0.9, 'test/loss': None}
    """
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics as JSON."""
    write_atomically(path, json.dumps(metrics, indent=2, sort_keys=True, allow_nan=False) + "\n")


def hyperparameters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the keys in `HYPERPARAMETERS`, as far as a config has them."""
    config = OmegaConf.create(dict(plain))
    values = {key: OmegaConf.select(config, key) for key in HYPERPARAMETERS}
    values["strategy"] = strategy_name(plain)
    return {
        key: str(value) if OmegaConf.is_config(value) else value
        for key, value in values.items()
        if value is not None
    }


def strategy_name(plain: Mapping[str, Any]) -> str:
    """The name of the strategy's class, in lower case."""
    return str(plain["strategy"]["_target_"]).rpartition(".")[2].lower()


def machine(trainer: pl.Trainer) -> str:
    """The name of the GPU or the processor of a run."""
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _with_best(metrics: dict[str, Any], best: BestCheckpoint) -> dict[str, Any]:
    last = {f"{name}_last": metrics[name] for name in best.best_metrics}
    return metrics | last | best.best_metrics
