"""The runs below some folders, in whatever state they are: config, results, curves."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from math import nan
from pathlib import Path
from typing import Any

from sglight import status
from sglight.config.schema import MODELS
from sglight.report.events import Curve, read_curves
from sglight.report.reading import MOST_VALUES, cleaned, number, read_json, read_yaml, resolved

# What `metrics.json` must have as numbers if the training did not diverge, in so far as it has them.
LOSSES = ("test/loss", "val/loss")
FRESH_S = (
    600.0  # a folder without `status.json` in which something changed since then is taken for a running one
)
NO_RUNS = ("predict", "export")  # modes that use a network: they leave nothing to compare
NAMES = ("dataset", "model", "strategy", "experiment", "debug")
COMPARED = ("finished", "running", "diverged")  # states of runs that have, or will have, something to compare


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: where it left its files.
        state: ``finished``; ``diverged`` (finished, but a loss is no number); ``running``; ``failed``; ``interrupted``;
            ``stopped`` (its process has gone without a word); ``tried`` (``debug=fast``); ``damaged`` (`metrics.json`
            or the config is unreadable).
        reason: why it failed, if known.
        config: its values by dotted key, and the names of the choices under the keys in `NAMES`.
        metrics: the numbers in `metrics.json`.
        curves: its scalars by tag.
        changed: when a file in its folder last changed, in seconds since 1970.
        machine, versions: what it ran on, and of what; empty if it does not say.
    """

    folder: Path
    state: str
    reason: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    changed: float = 0.0
    machine: str = ""
    versions: str = ""

    @property
    def aside(self) -> str:
        """Why it stands outside the comparison: its state, ``test`` or ``debug=...``; empty if it does not."""
        if self.state not in COMPARED:
            return self.state
        if self.config.get("mode") == "test":
            return "test"
        return f"debug={debug}" if (debug := self.config.get("debug")) else ""

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
    runs = [read_run(folder) for folder in folders]
    return [run for run in runs if run.config.get("mode") not in NO_RUNS]


def read_run(folder: Path) -> Run:
    """The run in ``folder``; one that cannot be read, for whatever reason, is ``damaged``."""
    try:
        return _read(folder)
    except Exception as error:  # of whatever class: the others are to be told of
        return Run(folder, "damaged", cleaned(f"it cannot be read: {type(error).__name__}: {error}"[:200]))


def _read(folder: Path) -> Run:
    config, written = read_config(folder), read_json(folder / "metrics.json")
    numbers = {cleaned(key): number(value) for key, value in (written or {}).items()}
    metrics = {key: value for key, value in numbers.items() if value is not None}
    changed = max((p.stat().st_mtime for p in folder.rglob("*") if p.is_file()), default=0.0)
    state, reason = _state(folder, config, written, changed)
    curves = _shifted(read_curves(folder), config, metrics)
    machine, versions = (
        cleaned(str((written or {}).get(key, ""))) for key in ("run/machine", "run/versions")
    )
    return Run(folder, state, reason, config, metrics, curves, changed, machine, versions)


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config by dotted key, with the names of the choices; empty if it cannot be read."""
    config = read_yaml(folder / "config.yaml") or resolved(read_yaml(folder / ".hydra" / "config.yaml"))
    if not all(isinstance(config.get(group), dict) for group in ("dataset", "model", "strategy")):
        return {}
    flat = dict(islice(_flat(cleaned(config)), MOST_VALUES))
    hydra = read_yaml(folder / ".hydra" / "hydra.yaml")
    for key in ("hydra", "runtime", "choices"):
        below = hydra.get(key)
        hydra = below if isinstance(below, dict) else {}
    choices = hydra
    dynamics = str(flat.get("model.dynamics"))
    names = {
        "dataset": flat.get("dataset.name"),
        "model": MODELS.get(dynamics, dynamics),
        "strategy": str(flat.get("strategy._target_")).rpartition(".")[2].lower(),
        **{name: cleaned(choices[name]) for name in NAMES if isinstance(choices.get(name), str)},
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
    state = cleaned(told.get("status", guess if written is None else "finished"))
    if not config:
        return ("running" if state == "running" else "damaged"), "its config cannot be read"
    if state != "finished":
        return state, cleaned(str(told.get("reason", "")))
    if written is None and config.get("trainer.fast_dev_run"):
        return "tried", "a dev run leaves no results"
    if not written:
        return "damaged", "metrics.json cannot be read"
    if any(key in written and number(written[key]) is None for key in LOSSES):
        return "diverged", "the loss is not finite"
    return cleaned(str(written.get("run/status", "finished"))), ""


def _shifted(
    curves: dict[str, Curve], config: Mapping[str, Any], metrics: Mapping[str, float]
) -> dict[str, Curve]:
    """The curves with the seconds of the training before them, if the run went on from another's checkpoint."""
    if config.get("ckpt") is None:
        return curves
    last = max((float(c.elapsed[-1]) for c in curves.values()), default=0.0)
    earlier = metrics.get("time/fit_s", nan) - last
    return {tag: c._replace(elapsed=c.elapsed + earlier) for tag, c in curves.items()}


def _flat(config: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
