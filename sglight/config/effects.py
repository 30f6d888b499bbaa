"""Refuses keys on the command line that would have no effect, or the opposite one; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sglight.config.levels import make_levels
from sglight.config.schema import MultilevelConfig
from sglight.config.settings import is_path
from sglight.errors import UserError

# (key, another key on whose value its effect depends, the values for which it has an effect)
OPTIMIZER = (
    ("momentum", "name", ("sgd",)),
    ("nesterov", "name", ("sgd",)),
    ("betas", "name", ("adam", "adamw", "nadam")),
    ("delay_momentum", "name", ("nadam",)),
)
EFFECTS = (
    *((f"strategy.{part}.{key}", f"strategy.{part}.{on}", values)
      for part in ("optimizer", "estimator.optimizer", "head.optimizer") for key, on, values in OPTIMIZER),
    ("strategy.scheduler.step_epochs", "strategy.scheduler.name", ("step",)),
    ("strategy.scheduler.gamma", "strategy.scheduler.name", ("step", "exponential", "plateau")),
    ("strategy.scheduler.patience", "strategy.scheduler.name", ("plateau",)),
    ("strategy.scheduler.min_factor", "strategy.scheduler.name", ("cosine", "plateau")),
    *((f"strategy.estimator.{key}", "strategy.source", ("synthetic",))
      for key in ("name", "hidden", "conditional", "kernel_size", "every_n_batches", "form")),
    *((f"strategy.head.{key}", "strategy.source", ("local",))
      for key in ("name", "hidden", "pool", "loss", "similarity")),
    *((f"strategy.estimator.{key}", "strategy.estimator.form", ("direct", "residual"))
      for key in ("conditional", "kernel_size")),
    ("strategy.head.similarity", "strategy.head.loss", ("predsim",)),
    ("strategy.head.hidden", "strategy.head.name", ("mlp", "conv")),
    ("strategy.head.pool", "model.kernel", ("conv",)),
    ("model.kernel_size", "model.kernel", ("conv",)),
    ("model.groups", "model.normalisation", ("group",)),
)  # fmt: skip
# The mode of a level without which a section has no effect in a multilevel training.
MODE_OF = {"strategy.estimator": "dni", "strategy.head": "local"}
NUMBER = re.compile(r"[+-]?[\d_]+")
OWN_KWARGS = (
    "optimizer",
    "scheduler",
)  # sections in which a class of the user's gets the arguments in `kwargs`
ESTIMATOR = {"linear": ("hidden", "kernel_size"), "mlp": ("kernel_size",)}  # keys that each kind ignores


def check_effects(cfg: DictConfig, given: Iterable[str]) -> None:
    """Refuse keys on the command line that nothing reads with the present choices, unless they have their default.

    Args:
        cfg: the config.
        given: the keys on the command line. Those that presets set may be without effect.

    Raises:
        UserError: that names the key and the choice to which it belongs.
    """
    modes = _level_modes(cfg)
    for key in given:
        _check_level(cfg, key, modes)
        for other, values in _needed(cfg, key):
            choice = OmegaConf.select(cfg, other)
            part = other.rpartition(".")[0]
            if (
                is_path(str(choice))
                and key not in (f"{part}.lr", f"{part}.weight_decay")
                and part.endswith(OWN_KWARGS)
            ):
                raise UserError(
                    f"{key}={OmegaConf.select(cfg, key)} has no effect with {other}={choice}; give its arguments in "
                    f"{part}.kwargs"
                )
            if str(choice) not in values and "." not in str(choice) and not _is_default(cfg, key):
                raise UserError(
                    f"{key}={OmegaConf.select(cfg, key)} has no effect with {other}={choice}; leave it out, or choose "
                    f"{other}={' or '.join(values)}"
                )


def check_switches(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Refuse numbers other than 0 and 1 for true or false; OmegaConf would take all of them for true."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if (
            isinstance(OmegaConf.select(cfg, key), bool)
            and NUMBER.fullmatch(value)
            and value not in ("0", "1")
        ):
            raise UserError(f"{key}={value} is not allowed; it must be true or false")


def check_monitors(cfg: DictConfig) -> None:
    """Refuse ``mode=max`` for a loss and ``mode=min`` for an accuracy, which take the worst value for the best."""
    for name in ("checkpoint", "early_stopping"):
        node = cfg.callbacks.get(name)
        if node is None:
            continue
        for ending, right in (("loss", "min"), ("acc", "max")):
            if str(node.monitor).endswith(ending) and str(node.mode) != right:
                raise UserError(
                    f"callbacks.{name}.monitor={node.monitor} with mode={node.mode} takes the worst for the best; "
                    f"set callbacks.{name}.mode={right}"
                )


def _check_level(cfg: DictConfig, key: str, modes: Sequence[str]) -> None:
    """Refuse a key of a section that no level of a multilevel training uses; ``modes`` are those of the levels."""
    section = ".".join(key.split(".")[:2])
    mode = MODE_OF.get(section)
    if modes and mode is not None and mode not in modes and not _is_default(cfg, key):
        raise UserError(
            f"{key} has no effect with levels that are {', '.join(modes)}, because {section} is for levels with "
            f"{mode}; leave it out, or let strategy.level.mode have {mode}"
        )


def _level_modes(cfg: DictConfig) -> list[str]:
    """The modes of the levels; empty without levels, or if they are not allowed, which is found later."""
    if OmegaConf.get_type(cfg, "strategy") is not MultilevelConfig:
        return []
    try:
        return [level.mode for level in make_levels(cfg.strategy.levels, {"mode": cfg.strategy.level.mode})]
    except ValueError:
        return []


def _needed(cfg: DictConfig, key: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The choices without which a key has no effect: (key of the choice, its values)."""
    yield from (
        (other, values)
        for name, other, values in EFFECTS
        if name == key and OmegaConf.select(cfg, other) is not None
    )
    part, _, name = key.rpartition(".")
    if part == "strategy.estimator" and name in ("hidden", "kernel_size"):
        yield f"{part}.name", tuple(k for k in ("mlp", "conv") if name not in ESTIMATOR.get(k, ()))


def _is_default(cfg: DictConfig, key: str) -> bool:
    """Whether a key has its schema's default, or no schema."""
    part, _, name = key.rpartition(".")
    schema = OmegaConf.get_type(OmegaConf.select(cfg, part))
    if not is_dataclass(schema):
        return True
    found: list[Any] = [f for f in fields(schema) if f.name == name]
    default = found[0].default if found and found[0].default is not MISSING else None
    if found and default is None and found[0].default_factory is not MISSING:
        default = found[0].default_factory()
    return bool(OmegaConf.select(cfg, key) == default)
