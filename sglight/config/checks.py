"""Checks that the values of a config are allowed together, before torch is imported.

Every check raises a `UserError` that names the key and says what would be right.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import partial
from importlib.util import find_spec
from math import inf
from operator import le
from os import environ
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from sglight.config.cuts import given_cuts
from sglight.config.datasets import CLOUD_CLASSES, ONE_SOURCE, SHAPES
from sglight.config.levels import first_epochs, make_levels
from sglight.config.pieces import check_shared
from sglight.config.ranges import check_ranges
from sglight.config.replicas import check_divides, refuse_in_pvd
from sglight.config.schema import (
    BackpropConfig,
    Dynamics,
    EstimatorConfig,
    EstimatorName,
    HeadConfig,
    LossConfig,
    PVDConfig,
)
from sglight.config.settings import check_name, settings
from sglight.config.shapes import check_filters, check_shapes
from sglight.errors import UserError

# Set in every process that torchrun starts.
TORCHRUN = "TORCHELASTIC_RUN_ID"
POINTS = "dataset.train_points dataset.val_points dataset.test_points"
# Modes that use a trained network.
DEPLOYMENT = ("predict", "export")
# The packages that formats of `mode=export` need.
PACKAGES = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript")}
# Keys of `callbacks` without a `_target_`, for callbacks that every run has.
SETTINGS = ("checkpoint", "timing", "memory")
# Loggers of Lightning: (the package that one needs, what to install).
LOGGERS = {
    "WandbLogger": ("wandb", "'sglight[wandb]'"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "CometLogger": ("comet_ml", "comet-ml"),
    "NeptuneLogger": ("neptune", "neptune"),
}
BATCHES = (  # keys that are a number of batches, or a part of all batches
    "trainer.limit_train_batches trainer.limit_val_batches trainer.limit_test_batches trainer.val_check_interval "
    "trainer.overfit_batches"
)


def check_values(cfg: DictConfig) -> None:
    """Refuse values that are out of their range."""
    check_ranges(cfg)
    _check_points(cfg)
    _each(
        cfg,
        BATCHES,
        lambda v: v >= 1 if isinstance(v, int) else 0 < v <= 1,
        "it must be a number of batches (a whole number, at least 1) or a part of them above 0.0, up to 1.0",
    )
    for key in (
        "strategy.optimizer.betas",
        "strategy.estimator.optimizer.betas",
        "strategy.head.optimizer.betas",
    ):
        betas = OmegaConf.select(cfg, key)
        if _numbers(betas) and len(betas) != 2:
            raise UserError(f"{key}={betas} is not allowed; it must be two numbers from 0 to less than 1")


def _check_points(cfg: DictConfig) -> None:
    """Refuse fewer points than a cloud has classes."""
    classes = CLOUD_CLASSES.get(str(OmegaConf.select(cfg, "dataset.name")), 1)
    _each(cfg, POINTS, partial(le, classes), f"it must be at least {classes}, a point of each class")


def check_model(model: DictConfig) -> None:
    """Refuse keys of the network that contradict each other."""
    check_name("model.dynamics", model.dynamics, list(Dynamics))
    widths = _per_segment("channels", model.channels, int)
    for name, kind in (("steps", int), ("horizon", float)):
        if (count := len(_per_segment(name, model[name], kind))) not in (1, len(widths)):
            raise UserError(
                f"model.{name} has {count} entries, but model.channels={model.channels} makes {len(widths)} segments; "
                "give one entry per segment, or one number for all"
            )
    if model.normalisation == "group" and (bad := [width for width in widths if width % model.groups]):
        raise UserError(
            f"model.groups={model.groups} does not divide model.channels={bad[0]}; choose a divisor of it"
        )
    if model.kernel == "conv" and model.kernel_size % 2 == 0:
        raise UserError(f"model.kernel_size={model.kernel_size} is even; it must be odd, as 3 or 5")
    if model.kernel != "conv":
        for key, value in (("head", "pool"), ("opening", "conv")):
            if model[key] == value:
                raise UserError(
                    f"model.{key}={value} works on images; add model.kernel=conv or choose another {key}"
                )
    if model.opening_normalisation != "none" and model.opening != "conv":
        raise UserError(
            f"model.opening_normalisation={model.opening_normalisation} needs model.opening=conv, "
            f"not {model.opening}; set it to none"
        )
    built_in = model.dynamics in list(Dynamics)  # a class of the user's checks itself what it supports
    if model.gamma and built_in and model.dynamics != "antisymmetric":
        raise UserError(
            f"model.gamma={model.gamma} is for model=antisymmetric only; with {model.dynamics} it must be 0"
        )
    if model.initial_velocity == "paper" and built_in and model.dynamics != "leapfrog":
        raise UserError("model.initial_velocity=paper is for model=leapfrog only; leave it at zero")
    if model.reversible and built_in and model.dynamics not in ("hamiltonian", "leapfrog"):
        raise UserError(
            f"model.reversible=true needs model=hamiltonian or model=leapfrog, not {model.dynamics}"
        )
    if model.reversible and model.normalisation == "batch":
        raise UserError(
            "model.reversible=true does not go with model.normalisation=batch, which cannot be undone; "
            "choose group, layer or none"
        )


def check_fit(cfg: DictConfig) -> None:
    """Refuse a network that does not fit the samples, if their shape is known without reading them."""
    schema = OmegaConf.get_type(cfg.dataset)
    if not is_dataclass(schema) or cfg.dataset._target_ != getattr(schema, "_target_", None):
        return  # a data set of the user's
    if (shape := SHAPES.get(str(cfg.dataset.name))) is None:
        return
    model, widths = cfg.model, _per_segment("channels", cfg.model.channels, int)
    try:
        check_shapes(shape, model.kernel, widths, model.opening, model.connector, model.pool)
        check_filters(shape, model, cfg.strategy)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_targets(cfg: DictConfig) -> None:
    """Refuse a strategy or a data set that names no class."""
    for group in ("dataset", "strategy"):
        node = cfg[group]
        if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
            raise UserError(
                f"{group}._target_ is missing; give package.module.Class there, with its arguments as keys beside it"
            )


def check_nodes(cfg: DictConfig) -> None:
    """Refuse callbacks and loggers that name no class, and loggers whose package is not installed."""
    for group, own in (("callbacks", SETTINGS), ("logger", ())):
        if not isinstance(cfg[group], DictConfig):
            raise UserError(f"{group}={cfg[group]} is not allowed; choose one of its files, see --help")
        if missing := [key for key in own if not isinstance(cfg[group].get(key), DictConfig)]:
            raise UserError(
                f"{group}.{missing[0]} is missing; begin your file of {group} with defaults: [default, _self_]"
            )
        for key, node in cfg[group].items():
            target = node.get("_target_") if isinstance(node, DictConfig) else None
            if key not in own and not isinstance(target, str):
                raise UserError(
                    f"{group}.{key}._target_ is missing; give package.module.Class there, with its arguments as keys "
                    "beside it"
                )
            package, extra = LOGGERS.get(str(target).rpartition(".")[2], (None, None))
            if package is not None and find_spec(package) is None:
                raise UserError(
                    f"logger={key} needs {package}; pip install {extra}, or choose logger=tensorboard"
                )


def check_strategy(cfg: DictConfig) -> None:
    """Refuse more stages or processors than time steps, and what does not fit the network."""
    steps = _per_segment("steps", cfg.model.steps, int)
    total = (
        sum(steps) if len(steps) > 1 else steps[0] * len(_per_segment("channels", cfg.model.channels, int))
    )
    for key in ("stages", "processors"):
        parts = _number(cfg, f"strategy.{key}")
        if parts is not None and parts > total:
            raise UserError(
                f"strategy.{key}={parts} is more than the network's {total} time steps; "
                f"use at most {total} {key} or raise model.steps"
            )
    levels = _number(cfg, "strategy.levels")
    if levels is not None:
        _check_levels(cfg, levels, steps)
    if OmegaConf.get_type(cfg.strategy) is PVDConfig:
        _check_pvd(cfg)
    warmup = OmegaConf.select(cfg, "strategy.scheduler.warmup_epochs")
    if warmup and OmegaConf.select(cfg, "strategy.scheduler.name") == "plateau":
        raise UserError(
            f"strategy.scheduler.warmup_epochs={warmup} does not go with name=plateau; set it to 0"
        )
    images = cfg.model.kernel == "conv" and cfg.model.head == "flatten"
    if OmegaConf.select(cfg, "strategy.regularisation.classifier_smoothness") and not images:
        raise UserError(
            "strategy.regularisation.classifier_smoothness needs a classifier that sees images: model.kernel=conv and "
            "model.head=flatten; set it to 0"
        )
    check_loss(cfg)
    check_optimizers(cfg)
    _check_cuts(cfg, total)
    pieces, samples = _number(cfg, "strategy.microbatches"), _number(cfg, "dataset.batch_size")
    if pieces is not None and samples is not None and pieces > samples:
        raise UserError(
            f"strategy.microbatches={pieces} is more than dataset.batch_size={samples}; use fewer, or leave it null"
        )
    if "slack" in cfg.strategy and is_dataclass(OmegaConf.get_type(cfg.strategy)):
        _check_delayed(cfg)
    _check_head(cfg)
    estimator = OmegaConf.select(cfg, "strategy.estimator")
    if estimator is not None and OmegaConf.get_type(estimator) is EstimatorConfig:
        check_name("strategy.estimator.name", cfg.strategy.estimator.name, list(EstimatorName))
    if OmegaConf.select(cfg, "strategy.estimator.name") == "conv":
        if cfg.model.kernel != "conv":
            raise UserError(
                "strategy.estimator.name=conv works on images; add model.kernel=conv or choose linear or mlp"
            )
        size = _number(cfg, "strategy.estimator.kernel_size")
        if size is not None and size % 2 == 0:
            raise UserError(f"strategy.estimator.kernel_size={size} must be odd, as 3 or 5")


def _check_head(cfg: DictConfig) -> None:
    """Refuse heads that do not fit the states of the network."""
    if OmegaConf.get_type(OmegaConf.select(cfg, "strategy.head")) is not HeadConfig:
        return
    if cfg.strategy.head.name == "conv" and cfg.model.kernel != "conv":
        raise UserError(
            "strategy.head.name=conv works on images; add model.kernel=conv or choose linear or mlp"
        )


def check_optimizers(cfg: DictConfig) -> None:
    """Refuse unknown names of optimisers and schedules, and ``kwargs`` without a class that takes them."""
    for key in ("strategy.optimizer", "strategy.scheduler", "strategy.estimator.optimizer"):
        node = OmegaConf.select(cfg, key)
        if isinstance(node, DictConfig) and is_dataclass(schema := OmegaConf.get_type(node)):
            settings(schema, {str(name): value for name, value in node.items()}, key)


def check_loss(cfg: DictConfig) -> None:
    """Refuse a loss that does not exist."""
    loss = OmegaConf.select(cfg, "strategy.loss")
    if loss is None or OmegaConf.get_type(loss) is not LossConfig:
        return
    check_name("strategy.loss.name", loss.name, ["cross_entropy", "mse"])


def _check_cuts(cfg: DictConfig, steps: int) -> None:
    """Refuse cuts that do not make ``strategy.stages`` stages."""
    cuts, stages = OmegaConf.select(cfg, "strategy.cuts"), _number(cfg, "strategy.stages")
    if isinstance(cuts, ListConfig) and stages is not None:
        multiple = 2 ** ((_number(cfg, "strategy.levels") or 1) - 1)
        try:
            given_cuts(list(cuts), steps, stages, multiple)
        except ValueError as error:
            raise UserError(str(error)) from error


def _check_delayed(cfg: DictConfig) -> None:
    """Refuse a training that ends before its first late gradient, and rebuilding states that cannot be rebuilt."""
    modes = OmegaConf.select(cfg, "strategy.level.mode")
    modes = modes if isinstance(modes, ListConfig) else [modes]
    if "level" in cfg.strategy and "delayed" not in modes:
        return
    exact = OmegaConf.select(cfg, "strategy.exact_epochs")
    if exact and exact >= cfg.trainer.max_epochs and not cfg.trainer.fast_dev_run:
        raise UserError(
            f"strategy.exact_epochs={exact:g} leaves no epoch of trainer.max_epochs={cfg.trainer.max_epochs} for late "
            "gradients; use fewer, or strategy=backprop"
        )
    if cfg.strategy.backward != "rebuilt":
        return
    built_in = cfg.model.dynamics in list(Dynamics)  # a class of the user's checks itself what it supports
    if built_in and cfg.model.dynamics not in ("hamiltonian", "leapfrog"):
        raise UserError(
            f"strategy.backward=rebuilt needs model=hamiltonian or model=leapfrog, which have an inverse, not "
            f"{cfg.model.dynamics}; use strategy.backward=stashed or replayed"
        )
    if cfg.model.normalisation == "batch":
        raise UserError(
            "strategy.backward=rebuilt does not go with model.normalisation=batch, whose states cannot be rebuilt; "
            "choose group, layer or none, or strategy.backward=stashed"
        )


def _check_levels(cfg: DictConfig, count: int, steps: Sequence[int]) -> None:
    """Refuse levels that do not divide the steps, their epochs, or the stages."""
    level = OmegaConf.select(cfg, "strategy.level")
    if not isinstance(level, DictConfig | None):
        raise UserError(
            f"strategy.level={level} is not allowed; set its keys instead: strategy.level.mode ..."
        )
    finer = 2 ** (count - 1)
    if bad := [n for n in steps if n % finer]:
        raise UserError(
            f"strategy.levels={count} halves the steps {count - 1} times, but model.steps={bad[0]} is no multiple of "
            f"{finer}; choose one, or fewer levels"
        )
    try:
        levels = make_levels(count, level)
        if not cfg.trainer.fast_dev_run:
            first_epochs(levels, cfg.trainer.max_epochs)
    except ValueError as error:
        raise UserError(str(error)) from error
    coarsest = (
        sum(steps)
        * (len(_per_segment("channels", cfg.model.channels, int)) if len(steps) == 1 else 1)
        // finer
    )
    stages = _number(cfg, "strategy.stages")
    if stages is not None and stages > coarsest:
        raise UserError(
            f"strategy.stages={stages} is more than the {coarsest} time steps of the coarsest of "
            f"strategy.levels={count}; use fewer stages or levels, or raise model.steps"
        )


def _check_pvd(cfg: DictConfig) -> None:
    """Refuse what PVD cannot minimise: it needs an objective that depends on the weights alone."""
    for key in ("normalisation", "opening_normalisation"):
        if cfg.model[key] == "batch":
            raise UserError(
                f"model.{key}=batch does not go with strategy=pvd, whose objective must depend on the weights alone; "
                f"choose another {key} or none"
            )
    optimizer = cfg.strategy.optimizer
    if optimizer.name == "adamw" and optimizer.weight_decay:
        raise UserError(
            "strategy.optimizer.name=adamw does not go with strategy=pvd: its decay belongs to no objective; choose "
            "adam, or set strategy.optimizer.weight_decay to 0"
        )
    if cfg.strategy.local_solver == "lbfgs" and cfg.strategy.clip_norm is not None:
        raise UserError("strategy.clip_norm does not go with strategy.local_solver=lbfgs; set it to null")


def check_workers(cfg: DictConfig) -> None:
    """Refuse more workers than stages, several machines without torchrun, and other workers than torchrun started."""
    devices, nodes, replicas = cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.replicas
    workers = devices * nodes
    _check_replicas(cfg, replicas, workers)
    groups = workers // replicas
    if OmegaConf.get_type(cfg.strategy) is BackpropConfig:
        try:
            check_shared(cfg.strategy.microbatches, groups)
        except ValueError as error:
            raise UserError(str(error)) from error
    key = "processors" if "processors" in cfg.strategy else "stages"
    parts = _number(cfg, f"strategy.{key}")
    if parts is None and is_dataclass(OmegaConf.get_type(cfg.strategy)):
        parts = 1
    if parts is not None and groups > parts:
        remedy = f"raise strategy.{key}" if key in cfg.strategy else "choose a strategy that has them, as dni"
        each = f" in each of trainer.replicas={replicas}" if replicas > 1 else ""
        raise UserError(
            f"trainer.devices={devices} on trainer.num_nodes={nodes} makes {groups} workers{each}, but there are only "
            f"{parts} {key.removesuffix('s')}(s); {remedy}, or lower trainer.devices"
        )
    if cfg.skip_completed and TORCHRUN in environ:
        raise UserError(
            "skip_completed=true does not go with torchrun, whose processes would each look; leave it out"
        )
    started = environ.get("WORLD_SIZE") if TORCHRUN in environ else None
    if started is None and nodes > 1:
        raise UserError(
            f"trainer.num_nodes={nodes} needs torchrun on each machine: torchrun --nnodes {nodes} "
            f"--nproc-per-node {devices} ... -m sglight ..., or under Slurm srun --nodes {nodes} "
            f"--ntasks-per-node {devices} python -m sglight ..."
        )
    if started is not None and int(started) != workers:
        by_slurm = environ[TORCHRUN].startswith("slurm-")
        program, key, of = (
            ("srun", "--ntasks-per-node", "--nodes")
            if by_slurm
            else ("torchrun", "--nproc-per-node", "--nnodes")
        )
        raise UserError(
            f"{program} has started {started} process(es), but trainer.devices={devices} on trainer.num_nodes={nodes} "
            f"makes {workers}; give {key}={devices} and {of}={nodes}"
        )


def _check_replicas(cfg: DictConfig, replicas: int, workers: int) -> None:
    """Refuse a number of replicas that does not divide the workers, or that leaves a replica without samples."""
    try:
        check_divides(replicas, workers)
        if OmegaConf.get_type(cfg.strategy) is PVDConfig:
            refuse_in_pvd(replicas)
    except ValueError as error:
        raise UserError(str(error)) from error
    samples, pieces = _number(cfg, "dataset.batch_size"), _number(cfg, "strategy.microbatches") or 1
    if samples is not None and samples < replicas * pieces:
        share = f" of strategy.microbatches={pieces}" if pieces > 1 else ""
        raise UserError(
            f"dataset.batch_size={samples} leaves some of trainer.replicas={replicas} without a sample{share}; raise "
            f"it to {replicas * pieces} or more, or use fewer replicas"
        )


def check_trainer(trainer: DictConfig) -> None:
    """Refuse arguments of the Trainer that Lightning would misread, or that do not work with several optimisers."""
    if trainer.precision in ("16-mixed", "16", "fp16"):
        raise UserError(
            f"trainer.precision={trainer.precision} scales the loss of one optimiser, but every stage has its own; "
            "use bf16-mixed or 32-true"
        )
    _one_of("trainer.precision", trainer.precision, ("32-true", "64-true", "bf16-mixed"))
    if trainer.profiler is not None:
        _one_of("trainer.profiler", trainer.profiler, ("simple", "advanced", "pytorch"))
    if trainer.max_time is not None and not re.fullmatch(r"\d\d:\d\d:\d\d:\d\d", trainer.max_time):
        raise UserError(f"trainer.max_time={trainer.max_time} is not of the form DD:HH:MM:SS, as 00:01:30:00")
    if trainer.max_time is not None and not trainer.max_time.strip("0:"):
        raise UserError(f"trainer.max_time={trainer.max_time} is no time; give more, or null for no limit")


def check_files(cfg: DictConfig) -> None:
    """Refuse files and folders that do not exist; paths are absolute here."""
    raw_dir = OmegaConf.select(cfg, "dataset.raw_dir")
    if raw_dir is not None and not Path(raw_dir).is_dir():
        raise UserError(f"dataset.raw_dir={raw_dir} is not a folder; give the one that holds the files")
    for key in ("dataset.archive", "dataset.path"):
        path = OmegaConf.select(cfg, key)
        if path is not None and not Path(path).is_file():
            raise UserError(f"{key}={path} is not a file; give the path of an existing one")
    if "archive" in cfg.dataset and (raw_dir is None) == (cfg.dataset.archive is None):
        raise UserError(ONE_SOURCE)
    if cfg.ckpt is not None and not Path(cfg.ckpt).is_file():
        raise UserError(f"ckpt={cfg.ckpt} is not a file; give the path of a checkpoint, or ckpt=last")
    if cfg.mode == "test" and cfg.ckpt is None:
        raise UserError("mode=test needs a checkpoint to evaluate; add ckpt=PATH or ckpt=last")
    if cfg.mode in DEPLOYMENT:
        _check_deployment(cfg)


def _check_deployment(cfg: DictConfig) -> None:
    """Refuse to predict or export without a checkpoint, an input, or the packages that are needed."""
    if cfg.ckpt is None:
        raise UserError(
            f"mode={cfg.mode} needs a trained network; add ckpt=PATH, a run's folder or a checkpoint"
        )
    if cfg.trainer.devices * cfg.trainer.num_nodes > 1:
        raise UserError(
            f"mode={cfg.mode} runs in one process; leave trainer.devices and trainer.num_nodes at 1"
        )
    if cfg.mode == "predict" and (cfg.predict.input is None or not Path(cfg.predict.input).exists()):
        raise UserError(
            f"predict.input={cfg.predict.input or 'null'} is not there; give a picture, a folder of pictures, or "
            "a .npy or HDF5 file"
        )
    needed = PACKAGES.get(cfg.export.format, ()) if cfg.mode == "export" else ()
    if missing := [name for name in needed if find_spec(name) is None]:
        raise UserError(
            f"export.format={cfg.export.format} needs {' and '.join(missing)}; pip install 'sglight[export]', or "
            "choose export.format=torch"
        )


def _each(cfg: DictConfig, keys: str, allowed: Callable[[Any], bool], rule: str) -> None:
    """Refuse a number under one of ``keys``, separated by spaces, that is not ``allowed``."""
    for key in keys.split():
        value = OmegaConf.select(cfg, key)
        if isinstance(value, int | float) and not allowed(value):
            raise UserError(f"{key}={value} is not allowed; {rule}")


def _number(cfg: DictConfig, key: str) -> int | None:
    """The whole number under a key, else None; values of another type are refused when the strategy is built."""
    value = OmegaConf.select(cfg, key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _numbers(value: Any) -> bool:
    """Whether ``value`` is a list of numbers; other values are refused when the strategy is built."""
    return isinstance(value, ListConfig) and all(isinstance(v, int | float) for v in value)


def _one_of(key: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UserError(f"{key}={value} is not allowed; choose one of {', '.join(options)}")


def _per_segment(name: str, value: Any, kind: type) -> list[Any]:
    """The entries of a number or list, each a positive `kind`."""
    values = list(value) if isinstance(value, ListConfig) else [value]
    kinds = (int,) if kind is int else (int, float)
    if not values or any(isinstance(v, bool) or not isinstance(v, kinds) or not 0 < v < inf for v in values):
        what = "positive whole number" if kind is int else "positive number"
        raise UserError(
            f"model.{name}={value} is not allowed; it must be a {what}, or a list of them, one per segment"
        )
    return values
