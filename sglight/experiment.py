"""The story of a run: build, fit, test, write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback

from sglight import results, signals
from sglight.building import (
    build_datamodule,
    build_module,
    prepare,
    set_threads,
    strategy_class,
    with_measured_cuts,
)
from sglight.callbacks.checkpoint import BestCheckpoint
from sglight.callbacks.console import Summary, print_result, print_results
from sglight.callbacks.memory import PeakMemory, forget_peak
from sglight.callbacks.record import Record, describe_data
from sglight.callbacks.tensorboard import add_hyperparameters, add_layout, add_results
from sglight.callbacks.timing import EpochTimer
from sglight.config.resumption import record_of, run_hash
from sglight.failures import explained
from sglight.files import write_atomically
from sglight.loggers import beginning, finish_loggers
from sglight.origin import Origin
from sglight.parallel.environment import agree, environment
from sglight.parallel.seats import of_trainer as seats_of
from sglight.process import set_up
from sglight.report.measures import BACKPROP
from sglight.strategies.staged import StagedModule, limited
from sglight.trainer import build_callbacks, build_trainer, check_limits, results_of
from sglight.yardstick import measured_speedup, versions

__all__ = [
    "build_callbacks", "build_datamodule", "build_module", "build_trainer", "prepare", "run", "set_up",
]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a run is to do; the same at all workers, except for the rank.

    Attributes:
        plain: the config.
        folder: of the run.
        name: the hash of the run, see `run_hash`.
        before: the record of the checkpoint from which the run resumes; empty if it does not.
        rank: of this worker.
        brief: whether to print only one line, at the end.
    """

    plain: Mapping[str, Any]
    folder: Path
    name: str
    before: Mapping[str, Any]
    rank: int
    brief: bool


@dataclass(frozen=True)
class Parts:
    """The objects of a run."""

    datamodule: Any
    module: StagedModule
    start: Origin
    trainer: pl.Trainer
    callbacks: list[Callback]
    best: BestCheckpoint
    summary: Summary
    timer: EpochTimer
    memory: PeakMemory


def run(plain: dict[str, Any], folder: Path, brief: bool = False) -> float:
    """Carry out the run of a plain config, or this worker's part of it; returns the monitored metric.

    Args:
        plain: the config.
        folder: of the run.
        brief: whether to print only one line, at the end.

    Raises:
        UserError: see `sglight.start.run`.
    """
    with explained(folder):
        task = agreed(plain, folder, brief)
        parts = build(task)
        if task.plain["mode"] == "test":
            metrics = results.test(parts.trainer, parts.module, parts.datamodule, task.plain["ckpt"])
            monitored: float = metrics["test/acc"]
        else:
            metrics = fit(parts)
            monitored = results.monitored(metrics, parts.best)
            metrics |= test(parts)
        write(task, parts, metrics, monitored)
    return monitored


def agreed(plain: dict[str, Any], folder: Path, brief: bool) -> Task:
    """The task, with config, folder and checkpoint as worker 0 has them."""
    rank, name = 0 if (place := environment()) is None else place.global_rank(), ""
    before: dict[str, Any] = {}
    if rank == 0:
        before = record_of(plain["ckpt"])
        name = run_hash(plain, before)
        plain = with_measured_cuts(plain)
    plain, folder, name, before = agree((plain, folder, name, before))
    return Task(plain, folder, name, before, rank, brief)


def build(task: Task) -> Parts:
    """Build data, strategy, callbacks and Trainer.

    Raises:
        UserError: if one cannot be built, or the checkpoint does not fit.
    """
    plain, folder = task.plain, task.folder
    set_up(plain, task.rank)
    opens = seats_of(plain["trainer"])[task.rank].group == 0
    datamodule = build_datamodule(plain, inputs=opens or strategy_class(plain).inputs_everywhere)
    check_limits(plain["trainer"], datamodule)
    data = describe_data(datamodule)
    module = build_module(plain, datamodule)
    forget_peak()  # now the libraries that read data are loaded, but not the data
    set_threads(plain, module, datamodule.batch_size)
    start = Origin.of(plain, module, data, task.before)
    if task.rank == 0:
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(plain))))
    best, callbacks = build_callbacks(plain["callbacks"], folder, plain["trainer"]["max_time"])
    summary = Summary(folder, plain["trainer"]["show_schedule"], task.brief)
    timer = EpochTimer(curves=plain["callbacks"]["timing"]["enabled"])
    memory = PeakMemory(curves=plain["callbacks"]["memory"]["enabled"])
    record = Record(plain, task.name, data["fingerprint"], task.before)
    limit = plain["trainer"]["overfit_batches"] or plain["trainer"]["limit_train_batches"]
    batches = limited(len(datamodule.train_dataloader()), limit)
    everything = [summary, *callbacks, timer, memory, record]
    trainer = build_trainer(plain, folder, everything, start.batches, batches)
    for logger in trainer.loggers:
        with beginning():
            add_hyperparameters(logger, results.hyperparameters(plain), results.COLUMNS)
        add_layout(logger)
    return Parts(datamodule, module, start, trainer, callbacks, best, summary, timer, memory)


def fit(parts: Parts) -> dict[str, Any]:
    """Train, unless the training of the checkpoint is complete; returns the metrics so far."""
    main = parts.trainer, parts.module, parts.datamodule, parts.best, parts.start
    if parts.start.is_over:
        metrics = results.validate(*main)
        parts.timer.take_over()
    else:
        metrics = results.fit(*main)
    return metrics | parts.timer.metrics() | parts.module.results()


def test(parts: Parts) -> dict[str, Any]:
    """Test the best checkpoint, or the last one if there is none; returns its metrics and those of callbacks."""
    ckpt = parts.best.best_model_path or (parts.start.ckpt if parts.start.is_over else None)
    metrics = results.test(parts.trainer, parts.module, parts.datamodule, ckpt)
    tested = {key: value for key, value in metrics.items() if key.startswith("test/")}
    return tested | results_of(parts.callbacks)


def write(task: Task, parts: Parts, metrics: Mapping[str, Any], monitored: float) -> None:
    """Write the results to ``metrics.json`` and the loggers, and print them; signals wait meanwhile."""
    signals.hold()
    sizes, plain = parts.summary.parameters.items(), task.plain
    found = {
        **metrics,
        **parts.memory.metrics(),
        "model/parameters": sum(size for name, size in sizes if name.startswith("stage_")),
        "run/seed": plain["seed"],
        "run/config_hash": task.name,
        "run/monitored": monitored,
        "run/machine": results.machine(parts.trainer),
        "run/versions": versions(),
        "run/status": "finished",
    }
    if task.rank == 0 and plain["mode"] != "test" and results.strategy_name(plain) != "backprop":
        found[BACKPROP] = measured_speedup(task.folder, found, Path("outputs"))
    found = results.as_json(found)
    if task.rank == 0:
        if not plain["trainer"]["fast_dev_run"]:
            results.write_metrics(task.folder / "metrics.json", found)
        for logger in parts.trainer.loggers:
            columns = {key: found.get(key) for key in results.COLUMNS}
            add_results(logger, columns, parts.trainer.global_step)
        has_events = any(task.folder.glob("events.out.tfevents.*"))
        (print_result if task.brief else print_results)(found, task.folder, has_events)
    finish_loggers()
