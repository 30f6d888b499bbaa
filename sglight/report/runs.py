"""The runs below some folders, in whatever state they are: config, results, curves."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sglight import status
from sglight.report.events import Curve, read_curves

# What `metrics.json` must have as numbers if the training did not diverge, in so far as it has them.
LOSSES = ("test/loss", "val/loss")
FRESH_S = (
    600.0  # a folder without `status.json` in which something changed since then is taken for a running one
)
NAMES = ("dataset", "model", "strategy", "experiment")
MODELS = {"euler": "resnet"}  # model=resnet has the dynamics euler; the others have the same names
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: where it left its files.
        state: ``finished``; ``diverged`` (finished, but a loss is no number); ``running``; ``failed``; ``interrupted``;
            ``stopped`` (its process has gone without a word); ``damaged`` (`metrics.json` or the config is unreadable).
        reason: why it failed, if known.
        config: its values by dotted key, and the names of the choices under the keys in `NAMES`.
        metrics: the numbers in `metrics.json`.
        curves: its scalars by tag.
        changed: when a file in its folder last changed, in seconds since 1970.
    """

    folder: Path
    state: str
    reason: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    changed: float = 0.0

    @property
    def seed(self) -> Any:
        """The seed of the run, None if its config cannot be read."""
        return self.config.get("seed")


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """All runs in and below ``paths``, each once, in order of their folders; jobs that were skipped are none.

    Raises:
        FileNotFoundError: if one of the paths does not exist.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no folder; give one with runs in it, such as outputs")
        seen = set()
        for here, below, files in os.walk(path, followlinks=True):
            if (real := Path(here).resolve()) in seen:
                below.clear()  # a link has led here before
                continue
            seen.add(real)
            below[:] = sorted((name for name in below if not name.startswith(".")), key=_natural)
            if _is_run(Path(here), files):
                folders[Path(here).resolve()] = None
                below.clear()
    return [read_run(folder) for folder in folders]


def read_run(folder: Path) -> Run:
    """The run in ``folder``."""
    config, written = read_config(folder), _read_json(folder / "metrics.json")
    metrics = {k: float(v) for k, v in (written or {}).items() if isinstance(v, int | float) and isfinite(v)}
    changed = max((p.stat().st_mtime for p in folder.rglob("*") if p.is_file()), default=0.0)
    state, reason = _state(folder, config, written, changed)
    curves = _shifted(read_curves(folder), config, metrics)
    return Run(folder, state, reason, config, metrics, curves, changed)


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config by dotted key, with the names of the choices; empty if it cannot be read."""
    config = _read_yaml(folder / "config.yaml") or _resolved(folder / ".hydra" / "config.yaml")
    if not all(isinstance(config.get(group), dict) for group in ("dataset", "model", "strategy")):
        return {}
    flat = dict(_flat(config))
    hydra = _read_yaml(folder / ".hydra" / "hydra.yaml")
    for key in ("hydra", "runtime", "choices"):
        below = hydra.get(key)
        hydra = below if isinstance(below, dict) else {}
    choices = hydra
    names = {
        "dataset": flat.get("dataset.name"),
        "model": MODELS.get(flat.get("model.dynamics", ""), flat.get("model.dynamics")),
        "strategy": str(flat.get("strategy._target_")).rpartition(".")[2].lower(),
        **{name: choices[name] for name in NAMES if choices.get(name)},
    }
    return {**{k: str(v) for k, v in names.items() if v is not None}, **flat}


def _natural(name: str) -> list[tuple[int, str]]:
    """To sort by numbers within names: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_run(folder: Path, files: list[str]) -> bool:
    if status.read(folder).get("status") == "skipped":
        return False
    if (folder / ".hydra" / "config.yaml").is_file() or "metrics.json" in files or status.FILE in files:
        return True
    return "config.yaml" in files and bool(read_config(folder))


def _state(
    folder: Path, config: Mapping[str, Any], written: dict[str, Any] | None, changed: float
) -> tuple[str, str]:
    told, guess = status.read(folder), "running" if time.time() - changed < FRESH_S else "stopped"
    state = told.get("status", guess if written is None else "finished")
    if not config:
        return ("running" if state == "running" else "damaged"), "its config cannot be read"
    if state != "finished":
        return state, str(told.get("reason", ""))
    if not written:
        return "damaged", "metrics.json cannot be read"
    if any(key in written and not _is_finite(written[key]) for key in LOSSES):
        return "diverged", "the loss is not finite"
    return str(written.get("run/status", "finished")), ""


def _shifted(
    curves: dict[str, Curve], config: Mapping[str, Any], metrics: Mapping[str, float]
) -> dict[str, Curve]:
    """The curves with the seconds of the training before them, if the run went on from another's checkpoint."""
    if config.get("ckpt") is None:
        return curves
    last = max((float(c.elapsed[-1]) for c in curves.values()), default=0.0)
    earlier = metrics.get("time/fit_s", nan) - last
    return {tag: c._replace(elapsed=c.elapsed + earlier) for tag, c in curves.items()}


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, empty if it is damaged, None if there is no such file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.load(path.read_text(), _LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _resolved(path: Path) -> dict[str, Any]:
    """Hydra's own copy of the config: there from the very beginning, but not resolved."""
    try:
        value = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException):
        return {}
    return dict(value) if isinstance(value, dict) else {}  # type: ignore[arg-type]


def _flat(config: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and isfinite(value)
