"""One run: put the parts together, fit, test, and write what came of it."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback, EarlyStopping, LearningRateMonitor, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger

from sglight.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from sglight.callbacks.console import Summary, print_results
from sglight.callbacks.figures import PlanarFigures
from sglight.callbacks.gradient_quality import GradientQuality
from sglight.callbacks.memory import PeakMemory, forget_peak
from sglight.callbacks.stability import StabilityMonitor
from sglight.callbacks.tensorboard import add_hyperparameters, add_layout
from sglight.callbacks.timeline import Timeline
from sglight.callbacks.timing import EpochTimer
from sglight.completed import config_hash
from sglight.config import check_settings
from sglight.errors import UserError
from sglight.extension import check_arguments, load_class
from sglight.files import replacing
from sglight.networks import NetworkSpec
from sglight.parallel.environment import agree, environment
from sglight.parallel.launcher import cores
from sglight.parallel.strategy import StageStrategy
from sglight.schema import STRATEGIES, StrategyConfig
from sglight.strategies import naming
from sglight.strategies.balance import measured_cuts
from sglight.strategies.staged import StagedModule, limited

# Keys of trainer.* that are ours, or that need translation, before the rest goes to Lightning's Trainer.
OWN_TRAINER_KEYS = ("threads", "idle_timeout_s", "share_devices", "show_schedule")
# Multiplications of a time step on a batch above which a second thread pays.
WORK_FOR_THREADS = 3e7
# Warnings that the user can do nothing about.
NOISE = (
    r".*treespec, LeafSpec",  # Lightning's use of torch
    r".*torch.jit.script. is deprecated",  # torch's own use of it, for forward-mode derivatives
    r"Detected call of `lr_scheduler.step",  # an estimator first learns `lag` batches later
)
HYPERPARAMETERS = (
    "seed", "dataset.name", "dataset.batch_size", "model.dynamics", "model.kernel", "model.steps", "model.horizon",
    "model.channels", "strategy.stages", "strategy.cuts", "strategy.microbatches", "strategy.slack",
    "strategy.backward", "strategy.lag", "strategy.estimator.name", "strategy.processors",
    "strategy.synchronisation", "strategy.levels", "strategy.prolongation", "strategy.optimizer.name",
    "strategy.optimizer.lr", "trainer.max_epochs", "trainer.precision", "trainer.devices",
)  # fmt: skip
# What a run asks of a data module.
NEEDED = ("name", "batch_size", "shape", "classes", "train_size", "val_size", "test_size")
# Of TensorBoard's HParams page.
COLUMNS = ("val/acc", "val/loss", "test/acc", "test/loss", "time/epoch_s", "memory/peak_bytes")


def run(plain: dict[str, Any], folder: Path) -> float:
    """The run that a plain config describes, in this process, or this worker's part of it; see `sglight.start.run`."""
    rank = 0 if (place := environment()) is None else place.global_rank()
    asked = config_hash(plain)
    if rank == 0:
        plain = with_measured_cuts(plain)
    plain, folder, asked = agree((plain, folder, asked))
    set_up(plain)
    forget_peak()
    if rank == 0:
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
    datamodule = build_datamodule(plain, inputs=rank == 0 or _strategy(plain).inputs_everywhere)
    module = build_module(plain, datamodule)
    here = plain["trainer"]["devices"]
    torch.set_num_threads(
        plain["trainer"]["threads"] or useful_threads(module.spec, datamodule.batch_size, here)
    )
    best, callbacks = build_callbacks(plain["callbacks"], folder)
    summary = Summary(folder, plain["trainer"]["show_schedule"])
    timer = EpochTimer(curves=plain["callbacks"]["timing"]["enabled"])
    memory = PeakMemory(curves=plain["callbacks"]["memory"]["enabled"])
    batches = limited(len(datamodule.train_dataloader()), plain["trainer"]["limit_train_batches"])
    plain["trainer"]["log_every_n_steps"] = min(plain["trainer"]["log_every_n_steps"], batches)
    trainer = build_trainer(plain, folder, [summary, *callbacks, timer, memory])
    for logger in trainer.loggers:
        add_hyperparameters(logger, _hyperparameters(plain), COLUMNS)
        add_layout(logger)
    ckpt, testing = plain["ckpt"], plain["mode"] == "test"
    if ckpt is not None:
        _check_checkpoint(ckpt, module, None if testing else plain["trainer"]["max_epochs"])
    with _explained():
        if testing:
            trainer.test(module, datamodule, ckpt_path=ckpt, verbose=False, weights_only=True)
            metrics = _metrics(trainer, module)
            monitored = metrics["test/acc"]
        else:
            trainer.fit(module, datamodule, ckpt_path=ckpt, weights_only=True)
            metrics = _validated(trainer, module, datamodule, best) | timer.metrics() | module.results()
            score = best.best_model_score
            monitored = float(metrics.get(str(best.monitor), math.nan) if score is None else score)
            metrics |= _test(trainer, module, datamodule, best)
            for callback in callbacks:
                if isinstance(callback, StabilityMonitor):
                    metrics |= callback.metrics()
    metrics |= memory.metrics() | {
        "model/parameters": sum(n for name, n in summary.parameters.items() if name.startswith("stage_")),
        "run/seed": plain["seed"],
        "run/config_hash": asked,
        "run/monitored": monitored,
        "run/status": "finished",
    }
    # Not a number is no JSON either.
    metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    if rank == 0:
        if not plain["trainer"]["fast_dev_run"]:
            text = json.dumps(metrics, indent=2, sort_keys=True, allow_nan=False) + "\n"
            write_atomically(folder / "metrics.json", text)
        print_results(
            metrics, folder, any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        )
    return monitored


def prepare(plain: Mapping[str, Any]) -> None:
    """Download and convert what ``dataset`` needs, unless that is done."""
    _datamodule(plain).prepare_data()


def build_datamodule(plain: Mapping[str, Any], inputs: bool = True) -> Any:
    """The data module of ``dataset``, prepared, so that shape and classes are known; with or without its inputs."""
    datamodule = _datamodule(plain)
    datamodule.inputs = inputs
    datamodule.prepare_data()
    datamodule.setup("fit")
    if missing := [name for name in NEEDED if not hasattr(datamodule, name)]:
        raise UserError(
            f"dataset._target_={plain['dataset']['_target_']} lacks {', '.join(missing)} after setup('fit'); "
            f"set the attributes {', '.join(NEEDED)} there at the latest"
        )
    return datamodule


def _datamodule(plain: Mapping[str, Any]) -> Any:
    settings = dict(plain["dataset"])
    kind = load_class(settings.pop("_target_"), "dataset._target_", pl.LightningDataModule)
    check_arguments(kind, settings, "dataset")
    return kind(**settings)


def with_measured_cuts(plain: dict[str, Any]) -> dict[str, Any]:
    """A config with ``strategy.cuts`` where ``strategy.balance`` is ``measured`` and there are none yet.

    Those of the checkpoint from which a training goes on, otherwise measured ones.
    """
    strategy = dict(plain["strategy"])
    if strategy.get("balance") != "measured" or strategy.get("cuts") is not None or strategy["stages"] == 1:
        return plain
    if plain["ckpt"] is not None:
        checkpoint = torch.load(plain["ckpt"], map_location="cpu", weights_only=True, mmap=True)
        strategy["cuts"] = checkpoint["sglight"]["strategy.cuts"]
    else:
        here, trainer = plain["trainer"]["devices"], plain["trainer"]
        set_up(plain)
        datamodule = build_datamodule(plain)
        module, samples = build_module(plain, datamodule), datamodule.batch_size
        torch.set_num_threads(trainer["threads"] or useful_threads(module.spec, samples, here))
        device = "cuda" if _uses_gpu(trainer["accelerator"]) and torch.cuda.is_available() else "cpu"
        strategy["cuts"] = list(measured_cuts(module.plan, samples, device)[1:-1])
    return {**plain, "strategy": strategy}


def build_module(plain: Mapping[str, Any], datamodule: Any) -> StagedModule:
    """The strategy's LightningModule for the network of ``model`` on that data."""
    network = {
        **plain["model"],
        "shape": tuple(datamodule.shape),
        "classes": datamodule.classes,
        "seed": plain["seed"],
    }
    settings = {key: value for key, value in plain["strategy"].items() if key not in ("_target_", "balance")}
    kind = _strategy(plain)
    check_arguments(kind, {"network": network, **settings}, "strategy", {"network"})
    check_settings(settings, _schema(kind))
    try:
        module = kind(network=network, **settings)
    except ValueError as error:
        # The network's own checks know the data's shape, which the config's could not.
        raise UserError(str(error)) from error
    return module


def _schema(kind: type[StagedModule]) -> type[StrategyConfig]:
    """The schema of the strategy that a class is or builds upon."""
    for schema in sorted(STRATEGIES.values(), key=lambda each: -len(each.__mro__)):
        if issubclass(kind, load_class(schema._target_, "strategy._target_", StagedModule)):
            return schema
    return StrategyConfig


def _strategy(plain: Mapping[str, Any]) -> type[StagedModule]:
    return load_class(plain["strategy"]["_target_"], "strategy._target_", StagedModule)


def build_callbacks(config: Mapping[str, Any], folder: Path) -> tuple[BestCheckpoint, list[Callback]]:
    """The checkpoint of the best epoch, and all callbacks that the config asks for."""
    checkpoint, stopping = config["checkpoint"], config["early_stopping"]
    best = BestCheckpoint(folder / "checkpoints", checkpoint["monitor"], checkpoint["mode"])
    last = LastCheckpoint(folder / "checkpoints", checkpoint["every_n_epochs"])
    callbacks: list[Callback] = []
    if stopping["enabled"]:
        settings = {key: stopping[key] for key in ("monitor", "mode", "patience")}
        callbacks.append(EarlyStopping(**settings))
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


def build_trainer(plain: Mapping[str, Any], folder: Path, callbacks: list[Callback]) -> pl.Trainer:
    """Lightning's Trainer for ``trainer``, ``logger`` and these callbacks."""
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
    try:
        return pl.Trainer(
            **config,
            callbacks=callbacks,
            logger=_logger(plain["logger"]["name"], folder),
            default_root_dir=folder,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
    except (MisconfigurationException, ValueError) as error:
        trainer = plain["trainer"]
        raise UserError(
            f"trainer.accelerator={trainer['accelerator']}, trainer.devices={trainer['devices']}, "
            f"trainer.precision={trainer['precision']}: {' '.join(str(error).split())} "
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
    devices, on_gpu = workers, _uses_gpu(trainer["accelerator"])
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


def _uses_gpu(accelerator: str) -> bool:
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())


def write_atomically(path: Path, text: str) -> None:
    """Write a file such that it is either whole or as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def useful_threads(spec: NetworkSpec, batch_size: int, workers: int = 1) -> int:
    """A worker's share of the cores for steps that keep them busy, otherwise one.

    Threads that wait for each other cost more than they bring, the more so when the machine has other work: a thread
    that is not scheduled holds up all.
    """
    busy = max(spec.step_costs()) * batch_size > WORK_FOR_THREADS
    return max(cores() // workers, 1) if busy else 1


def set_up(plain: Mapping[str, Any]) -> None:
    """Seed, and silence from Lightning about what the user cannot change."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning.profilers").setLevel(logging.INFO)  # its table, if asked for
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    keep_freed_memory()
    if not torch.cuda.is_available():
        # Otherwise every step of an optimiser looks for the driver again, at a fifth of a millisecond each.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    pl.seed_everything(plain["seed"], workers=True, verbose=False)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory up to 32 MiB a piece, its most.

    Otherwise it hands tensors of some MiB back to the system and faults them in again at every step, which takes
    longer than what is computed with them.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 2**31 - 1)


def _logger(name: str, folder: Path) -> Logger | bool:
    if name == "tensorboard":
        return TensorBoardLogger(folder, name=None, version="", default_hp_metric=False)
    if name == "csv":
        return CSVLogger(folder, name="", version="")
    return False


def _hyperparameters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen keys of the config, flat."""
    config = OmegaConf.create(dict(plain))
    values = {key: OmegaConf.select(config, key) for key in HYPERPARAMETERS}
    values["strategy"] = plain["strategy"]["_target_"].rpartition(".")[2].lower()
    return {
        key: str(value) if OmegaConf.is_config(value) else value
        for key, value in values.items()
        if value is not None
    }


def _check_checkpoint(path: str, module: StagedModule, max_epochs: int | None) -> None:
    """Refuse a checkpoint that is damaged, of another network or strategy, or (to resume) already at its last epoch."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (LookupError, TypeError, OSError, EOFError, RuntimeError, UnpicklingError) as error:
        raise UserError(
            f"ckpt={path} is not a checkpoint of sglight, or is damaged; give another, such as the run's best.ckpt"
        ) from error
    training = None if max_epochs is None else module.training_identity()
    naming.check(checkpoint, module.identity(), training, f"ckpt={path}")
    if max_epochs is not None and checkpoint["epoch"] + 1 >= max_epochs:
        raise UserError(
            f"ckpt={path} has trained {checkpoint['epoch'] + 1} epochs already; set trainer.max_epochs above that to "
            "go on, or mode=test to evaluate it"
        )


def _validated(
    trainer: pl.Trainer, module: StagedModule, datamodule: Any, best: BestCheckpoint
) -> dict[str, Any]:
    """Metrics of a training, those of the validation at its best epoch, and at its last as ``val/*_last``."""
    metrics = _metrics(trainer, module)
    # Stopped before the first validation, of this network.
    if best.monitor not in metrics or best.validated_level not in (None, module.level):
        trainer.validate(module, datamodule, verbose=False)
        metrics |= _metrics(trainer, module)
    last = {f"{name}_last": metrics[name] for name in best.best_metrics}
    return metrics | last | best.best_metrics


def _test(trainer: pl.Trainer, module: StagedModule, datamodule: Any, best: BestCheckpoint) -> dict[str, Any]:
    path = best.best_model_path or None  # a dev run writes none
    trainer.test(module, datamodule, ckpt_path=path, verbose=False, weights_only=True)
    return {key: value for key, value in _metrics(trainer, module).items() if key.startswith("test/")}


def _metrics(trainer: pl.Trainer, module: StagedModule) -> dict[str, Any]:
    values = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("lr/")}
    return values | {
        "run/stages": len(module.cuts) - 1,
        "run/workers": trainer.world_size,
        "run/epochs": trainer.current_epoch,
        "run/steps": trainer.global_step,
    }


@contextmanager
def _explained() -> Iterator[None]:
    """What Lightning finds wrong with settings while it runs, as a sentence."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(
            f"Lightning refuses the settings of trainer: {' '.join(str(error).split())}"
        ) from error
    except RuntimeError as error:
        if "Early stopping conditioned on metric" not in str(error):
            raise
        raise UserError(f"callbacks.early_stopping.monitor: {' '.join(str(error).split())}") from error
