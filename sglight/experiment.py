"""One run: put the parts together, fit, test, and write what came of it."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from pytorch_lightning.loggers import TensorBoardLogger

from sglight.archive import read_plain
from sglight.callbacks.checkpoint import BestCheckpoint
from sglight.callbacks.console import Summary, print_result, print_results
from sglight.callbacks.memory import PeakMemory, forget_peak
from sglight.callbacks.record import Record, describe_data
from sglight.callbacks.stability import StabilityMonitor
from sglight.callbacks.tensorboard import add_hyperparameters, add_layout, add_results
from sglight.callbacks.timing import EpochTimer
from sglight.config.composing import check_settings
from sglight.config.extension import check_arguments, load_class
from sglight.config.machine import processor
from sglight.config.resumption import record_of, run_hash
from sglight.config.schema import STRATEGIES, StrategyConfig
from sglight.config.shapes import check_filters
from sglight.errors import Diverged, RunFailed, UserError
from sglight.files import replacing
from sglight.origin import Origin
from sglight.parallel.environment import agree, environment
from sglight.process import set_up, useful_threads
from sglight.report.measures import BACKPROP
from sglight.strategies.balance import measured_cuts
from sglight.strategies.staged import StagedModule, limited
from sglight.trainer import build_callbacks, build_trainer, uses_gpu
from sglight.yardstick import measured_speedup, versions

HYPERPARAMETERS = (
    "strategy", "strategy.stages", "model.dynamics", "model.kernel", "model.steps", "model.horizon", "model.channels",
    "dataset.name", "dataset.batch_size", "strategy.cuts", "strategy.microbatches", "strategy.slack",
    "strategy.backward", "strategy.lag", "strategy.estimator.name", "strategy.processors",
    "strategy.synchronisation", "strategy.levels", "strategy.prolongation", "strategy.optimizer.name",
    "strategy.optimizer.lr", "trainer.max_epochs", "trainer.precision", "trainer.devices",
    "seed",
)  # fmt: skip
# Errors of a system call that a file has no room.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a run asks of a data module.
NEEDED = ("name", "batch_size", "shape", "classes", "train_size", "val_size", "test_size")
# Of TensorBoard's HParams page.
COLUMNS = (
    "val/acc", "val/loss", "test/acc", "test/loss", "time/epoch_s", BACKPROP, "memory/peak_bytes",
)  # fmt: skip


def run(plain: dict[str, Any], folder: Path, brief: bool = False) -> float:
    """The run that a plain config describes, in this process, or this worker's part of it; see `sglight.start.run`.

    Args:
        brief: print a line at its end only.
    """
    with _explained(folder):
        rank, name = 0 if (place := environment()) is None else place.global_rank(), ""
        before: dict[str, Any] = {}
        if rank == 0:
            before = record_of(plain["ckpt"])
            name = run_hash(plain, before)
            plain = with_measured_cuts(plain)
        plain, folder, name, before = agree((plain, folder, name, before))
        return _run(plain, folder, name, before, rank, brief)


def _run(
    plain: dict[str, Any], folder: Path, name: str, before: Mapping[str, Any], rank: int, brief: bool
) -> float:
    ckpt, testing = plain["ckpt"], plain["mode"] == "test"
    set_up(plain, rank)
    datamodule = build_datamodule(plain, inputs=rank == 0 or _strategy(plain).inputs_everywhere)
    data = describe_data(datamodule)
    module = build_module(plain, datamodule)
    forget_peak()  # the libraries that read the data are there, and the data themselves not yet
    here = plain["trainer"]["devices"]
    torch.set_num_threads(
        plain["trainer"]["threads"] or useful_threads(module.spec, datamodule.batch_size, here)
    )
    start = Origin.of(plain, module, data, before)
    if rank == 0:
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(plain)))
    best, callbacks = build_callbacks(plain["callbacks"], folder, plain["trainer"]["max_time"])
    summary = Summary(folder, plain["trainer"]["show_schedule"], brief)
    timer = EpochTimer(curves=plain["callbacks"]["timing"]["enabled"])
    memory = PeakMemory(curves=plain["callbacks"]["memory"]["enabled"])
    record = Record(plain, name, data["fingerprint"], before)
    batches = limited(len(datamodule.train_dataloader()), plain["trainer"]["limit_train_batches"])
    plain["trainer"]["log_every_n_steps"] = min(plain["trainer"]["log_every_n_steps"], batches)
    trainer = build_trainer(plain, folder, [summary, *callbacks, timer, memory, record], start.batches)
    for logger in trainer.loggers:
        add_hyperparameters(logger, _hyperparameters(plain), COLUMNS)
        add_layout(logger)
    if testing:
        trainer.test(module, datamodule, ckpt_path=ckpt, verbose=False, weights_only=True)
        metrics = _metrics(trainer, module)
        monitored = metrics["test/acc"]
    else:
        if start.is_over:
            validated = _validated_again(trainer, module, datamodule, best, start)
            timer.take_over()
        else:
            trainer.fit(module, datamodule, ckpt_path=ckpt, weights_only=True)
            _check_trained(trainer, start, plain)
            validated = _validated(trainer, module, datamodule, best)
        metrics = validated | timer.metrics() | module.results()
        score = best.best_model_score
        monitored = float(metrics.get(str(best.monitor), math.nan) if score is None else score)
        metrics |= _test(trainer, module, datamodule, best, ckpt if start.is_over else None)
        for callback in callbacks:
            if isinstance(callback, StabilityMonitor):
                metrics |= callback.metrics()
    metrics |= memory.metrics() | {
        "model/parameters": sum(n for name, n in summary.parameters.items() if name.startswith("stage_")),
        "run/seed": plain["seed"],
        "run/config_hash": name,
        "run/monitored": monitored,
        "run/machine": _place(trainer),
        "run/versions": versions(),
        "run/status": "finished",
    }
    if rank == 0 and not testing and _strategy_name(plain) != "backprop":
        metrics[BACKPROP] = measured_speedup(folder, metrics, Path("outputs"))
    # Not a number is no JSON either.
    metrics = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
    if rank == 0:
        if not plain["trainer"]["fast_dev_run"]:
            text = json.dumps(metrics, indent=2, sort_keys=True, allow_nan=False) + "\n"
            write_atomically(folder / "metrics.json", text)
        for logger in trainer.loggers:
            add_results(logger, {key: metrics.get(key) for key in COLUMNS}, trainer.global_step)
        logs = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        tell = print_result if brief else print_results
        tell(metrics, folder, logs)
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
        strategy["cuts"] = read_plain(Path(plain["ckpt"]), f"ckpt={plain['ckpt']}")["sglight"][
            "strategy.cuts"
        ]
    else:
        here, trainer = plain["trainer"]["devices"], plain["trainer"]
        set_up(plain)
        datamodule = build_datamodule(plain)
        module, samples = build_module(plain, datamodule), datamodule.batch_size
        torch.set_num_threads(trainer["threads"] or useful_threads(module.spec, samples, here))
        device = "cuda" if uses_gpu(trainer["accelerator"]) and torch.cuda.is_available() else "cpu"
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
        check_filters(network["shape"], plain["model"], settings)
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


def write_atomically(path: Path, text: str) -> None:
    """Write a file such that it is either whole or as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def _hyperparameters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen keys of the config, flat."""
    config = OmegaConf.create(dict(plain))
    values = {key: OmegaConf.select(config, key) for key in HYPERPARAMETERS}
    values["strategy"] = _strategy_name(plain)
    return {
        key: str(value) if OmegaConf.is_config(value) else value
        for key, value in values.items()
        if value is not None
    }


def _strategy_name(plain: Mapping[str, Any]) -> str:
    return str(plain["strategy"]["_target_"]).rpartition(".")[2].lower()


def _place(trainer: pl.Trainer) -> str:
    """What the run was computed on."""
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def _check_trained(trainer: pl.Trainer, start: Origin, plain: Mapping[str, Any]) -> None:
    """Refuse to take a training of no batch for a finished one."""
    if trainer.global_step == start.batches:
        raise UserError(
            f"trainer.max_time={plain['trainer']['max_time']} was over before the first batch, and nothing was "
            "trained; allow more"
        )


def _validated_again(
    trainer: pl.Trainer, module: StagedModule, datamodule: Any, best: BestCheckpoint, start: Origin
) -> dict[str, Any]:
    """What `_validated` gives, of a training that had ended when its process did."""
    trainer.validate(module, datamodule, ckpt_path=start.ckpt, verbose=False, weights_only=True)
    best.take_over(trainer, start.ckpt)
    metrics = {**start.metrics, **_metrics(trainer, module)} | {
        "run/epochs": start.epochs,
        "run/steps": start.batches,
    }
    last = {f"{name}_last": metrics[name] for name in best.best_metrics}
    return metrics | last | best.best_metrics


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


def _test(
    trainer: pl.Trainer, module: StagedModule, datamodule: Any, best: BestCheckpoint, last: str | None
) -> dict[str, Any]:
    """The test of the best checkpoint; of the last one, or of the network as it is, where there is none."""
    path = best.best_model_path or last
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
def _explained(folder: Path) -> Iterator[None]:
    """What Lightning finds wrong with settings while it runs, and a full disk, as a sentence."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(
            f"Lightning refuses the settings of trainer: {' '.join(str(error).split())}"
        ) from error
    except OverflowError as error:
        raise Diverged(
            f"a number has become too large ({error}); lower strategy.scheduler.gamma or strategy.optimizer.lr"
        ) from error
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _full(folder, error) from error
    except RuntimeError as error:
        if "PytorchStreamWriter failed" in str(error) or "file write failed" in str(error):
            raise _full(folder, error) from error
        if "Early stopping conditioned on metric" not in str(error):
            raise
        raise UserError(f"callbacks.early_stopping.monitor: {' '.join(str(error).split())}") from error


def _full(folder: Path, error: Exception) -> RunFailed:
    reason = error.strerror if isinstance(error, OSError) else "the disk takes no more"
    return RunFailed(
        f"{folder} cannot be written: {reason}; make room there, or choose another hydra.run.dir"
    )
