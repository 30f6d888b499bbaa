"""Builds the data module and the strategy of a run from its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from sglight.archive import read_plain
from sglight.config.composing import check_settings
from sglight.config.extension import check_arguments, load_class
from sglight.config.schema import STRATEGIES, StrategyConfig
from sglight.config.shapes import check_filters
from sglight.errors import UserError
from sglight.process import set_up, useful_threads
from sglight.strategies.balance import measured_cuts
from sglight.strategies.staged import StagedModule
from sglight.trainer import uses_gpu

# Attributes that a data module must have.
NEEDED = ("name", "batch_size", "shape", "classes", "train_size", "val_size", "test_size")


def prepare(plain: Mapping[str, Any]) -> None:
    """Download and convert the data set, unless that is done."""
    _datamodule(plain).prepare_data()


def build_datamodule(plain: Mapping[str, Any], inputs: bool = True) -> Any:
    """The data module of ``dataset``, after ``prepare_data`` and ``setup("fit")``.

    Args:
        plain: the config.
        inputs: whether samples are needed; a worker without the first stage needs only labels.

    Raises:
        UserError: if its class cannot be built, or lacks attributes that a run needs.
    """
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
    """With ``strategy.balance=measured``, the config with ``strategy.cuts`` filled in, unless they are given.

    A resumed training takes the cuts of its checkpoint; otherwise the stages are measured.
    """
    strategy = dict(plain["strategy"])
    if strategy.get("balance") != "measured" or strategy.get("cuts") is not None or strategy["stages"] == 1:
        return plain
    if plain["ckpt"] is not None:
        strategy["cuts"] = read_plain(Path(plain["ckpt"]), f"ckpt={plain['ckpt']}")["sglight"][
            "strategy.cuts"
        ]
    else:
        set_up(plain)
        datamodule = build_datamodule(plain)
        module = build_module(plain, datamodule)
        set_threads(plain, module, datamodule.batch_size)
        on_gpu = uses_gpu(plain["trainer"]["accelerator"]) and torch.cuda.is_available()
        cuts = measured_cuts(module.plan, datamodule.batch_size, "cuda" if on_gpu else "cpu")
        strategy["cuts"] = list(cuts[1:-1])
    return {**plain, "strategy": strategy}


def build_module(plain: Mapping[str, Any], datamodule: Any) -> StagedModule:
    """The LightningModule of ``strategy``, with the network of ``model`` for this data.

    Raises:
        UserError: if keys are unknown or missing, or do not go with the data.
    """
    network = {
        **plain["model"],
        "shape": tuple(datamodule.shape),
        "classes": datamodule.classes,
        "seed": plain["seed"],
    }
    settings = {key: value for key, value in plain["strategy"].items() if key not in ("_target_", "balance")}
    kind = strategy_class(plain)
    check_arguments(kind, {"network": network, **settings}, "strategy", {"network"})
    check_settings(settings, _schema(kind))
    try:
        check_filters(network["shape"], plain["model"], settings)
        module = kind(network=network, **settings)
    except ValueError as error:
        # A check of the network that needs the shape of the data.
        raise UserError(str(error)) from error
    return module


def _schema(kind: type[StagedModule]) -> type[StrategyConfig]:
    """The schema of a strategy's class, or of the class from which it derives."""
    for schema in sorted(STRATEGIES.values(), key=lambda each: -len(each.__mro__)):
        if issubclass(kind, load_class(schema._target_, "strategy._target_", StagedModule)):
            return schema
    return StrategyConfig


def strategy_class(plain: Mapping[str, Any]) -> type[StagedModule]:
    """The class given by ``strategy._target_``."""
    return load_class(plain["strategy"]["_target_"], "strategy._target_", StagedModule)


def set_threads(plain: Mapping[str, Any], module: StagedModule, samples: int) -> None:
    """Set the number of threads of this process: ``trainer.threads``, or as many as a batch of ``samples`` can use."""
    trainer = plain["trainer"]
    torch.set_num_threads(
        trainer["threads"] or useful_threads(module.spec, samples // trainer["replicas"], trainer["devices"])
    )
