"""Finds the checkpoint of ``ckpt=...``, and completes the config from it; imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf, open_dict

from sglight.archive import check_whole, read_record
from sglight.config.datasets import SCHEMAS as DATASETS
from sglight.config.resumption import conflicts, flat, inherited, is_in
from sglight.config.schema import STRATEGIES
from sglight.errors import UserError

CHOICES = ("dataset", "model", "strategy")


def absolute(key: str, path: str) -> str:
    """The absolute path of one that starts at the directory of the command, or with ``~``.

    Raises:
        UserError: if the user has no home directory, as in some containers; ``key`` is the config key of the path.
    """
    try:
        return to_absolute_path(str(Path(path).expanduser()) if path.startswith("~") else path)
    except RuntimeError as error:
        raise UserError(
            f"{key}={path}: this user has no home directory; give {key} another path, or set the variable HOME"
        ) from error


def resolve_ckpt(ckpt: str | None, cfg: DictConfig | None = None) -> str | None:
    """The absolute path of the checkpoint that `ckpt` names: a file, a run folder, or `last`.

    A run folder means its last checkpoint. `last` means the `checkpoints/last.ckpt` of the present run folder if there
    is one (because `hydra.run.dir` names an earlier run). Otherwise it is the newest one under `outputs` of a run with
    the same dataset, model and strategy, and the same values for the keys on the command line.

    Raises:
        UserError: if `last` finds none.
    """
    if ckpt is None:
        return None
    if ckpt != "last":
        path = Path(absolute("ckpt", ckpt))
        return str(path / "checkpoints" / "last.ckpt" if path.is_dir() else path)
    if not HydraConfig.initialized():
        raise UserError("ckpt=last is known to the command only; give the path of a checkpoint")
    hydra = HydraConfig.get()
    own = Path(absolute("hydra.run.dir", hydra.runtime.output_dir), "checkpoints", "last.ckpt")
    if own.is_file():
        return str(own)
    choices = {group: str(hydra.runtime.choices[group]) for group in CHOICES}
    found = 0
    for path in sorted(Path(absolute("outputs", "outputs")).rglob("checkpoints/last.ckpt"), key=_age):
        if _has_choices(path, choices):
            if cfg is None or _fits(path, cfg):
                return str(path)
            found += 1
    which = f"; none of the {found} that there are fits the keys given" if found else ""
    name = "-".join(choices.values())
    raise UserError(
        f"ckpt=last finds no run of {name} with a checkpoint under outputs/{which}; give the path of one"
    )


def with_record(cfg: DictConfig) -> DictConfig:
    """`cfg` with the values of its checkpoint for all keys that the command line does not give."""
    record = read_record(Path(cfg.ckpt), f"ckpt={cfg.ckpt}")
    if not record or not HydraConfig.initialized():
        return cfg
    mixed, _, plain = _mixed(record["config"], cfg)
    if mixed == plain:
        return cfg
    cfg = deepcopy(cfg)
    for group, schemas in (("dataset", DATASETS), ("strategy", STRATEGIES)):
        target = mixed[group].get("_target_")
        found = [schema for schema in schemas.values() if getattr(schema, "_target_", None) == target]
        if found and OmegaConf.get_type(cfg[group]) is not found[0]:
            with open_dict(cfg):
                cfg[group] = OmegaConf.structured(found[0])
        elif not found:
            with open_dict(cfg):
                cfg[group] = mixed[group]
    for key, value in mixed.items():
        if key == "logger":  # replaced as a whole: the keys are the loggers
            cfg.logger = value
        elif isinstance(value, dict) and isinstance(cfg[key], DictConfig):
            cfg[key].merge_with(value)
        elif key in cfg:
            cfg[key] = value
    return cfg


def _mixed(saved: Mapping[str, Any], cfg: DictConfig) -> tuple[dict[str, Any], list[str], dict[str, Any]]:
    """What `inherited` returns for a checkpoint's config, and the present config as a plain one."""
    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    raw = flat(cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False)))
    derived = [key for key, value in raw.items() if isinstance(value, str) and "${" in value]
    return *inherited(saved, plain, HydraConfig.get().overrides.task, derived), plain


def _fits(path: Path, cfg: DictConfig) -> bool:
    """Whether a checkpoint is complete and has the same values for the keys on the command line."""
    try:
        record = read_record(path, "it")
        if record:
            mixed, given, _ = _mixed(record["config"], cfg)
            if any(is_in(key, given) or key == "strategy" for key, *_ in conflicts(record["config"], mixed)):
                return False
        check_whole(path, "it")
    except UserError:
        print(f"ckpt=last passes over {path}, which is damaged", file=sys.stderr)
        return False
    return True


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def _has_choices(path: Path, choices: Mapping[str, str]) -> bool:
    """Whether a checkpoint is of a run with these choices: its folder is named after them, or its record has them."""
    folder, name = path.parents[1].name, "-".join(choices.values())
    if folder.endswith(f"-{name}") or f"-{name}-seed" in folder:
        return True
    try:
        return bool(read_record(path, "it").get("choices") == choices)
    except UserError:
        return False
