"""Finds and reads runs, in whatever state they are: config, results and curves."""

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

# Results that are null in `metrics.json` if the training has diverged.
LOSSES = ("test/loss", "val/loss")
FRESH_S = 600.0  # without `status.json`, a run counts as running if a file has changed within this time
NO_RUNS = ("predict", "export")  # modes that have no results to compare
NAMES = ("dataset", "model", "strategy", "experiment", "debug")
COMPARED = ("finished", "running", "diverged")  # states of runs that have, or will have, something to compare


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        folder: of its files.
        state: ``finished``; ``diverged`` (a loss is not finite); ``running``; ``failed``; ``interrupted``; ``stopped``
            (its process has ended without writing a status); ``tried`` (``debug=fast``); ``damaged`` (`metrics.json` or
            the config cannot be read).
        reason: why it failed, if known.
        config: its values by dotted key, and the names of the choices under the keys in `NAMES`.
        metrics: the numbers in `metrics.json`.
        curves: its scalars by tag.
        changed: when a file in its folder last changed, in seconds since 1970.
        machine, versions: the machine and the versions of the libraries; empty if not known.
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
        """Why the run is not compared: its state, ``test`` or ``debug=...``; empty if it is."""
        if self.state not in COMPARED:
            return self.state
        if self.config.get("mode") == "test":
            return "test"
        return f"debug={debug}" if (debug := self.config.get("debug")) else ""

    @property
    def seed(self) -> Any:
        """The seed of the run; None if its config cannot be read."""
        return self.config.get("seed")


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """All runs in and below ``paths``, each once, in order of their folders; for a skipped job the run done before.

    Raises:
        FileNotFoundError: if one of the paths is no folder.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no folder; give one with runs in it, such as outputs")
        seen = set()
        for here, below, files in os.walk(path, followlinks=True):
            if (real := Path(here).resolve()) in seen:
                below.clear()  # reached before, through a link
                continue
            seen.add(real)
            below[:] = sorted((name for name in below if not name.startswith(".")), key=_natural)
            if (folder := _run_in(Path(here), files)) is not None:
                folders[folder.resolve()] = None
                below.clear()
    runs = [read_run(folder) for folder in folders]
    return [run for run in runs if run.config.get("mode") not in NO_RUNS]


def read_run(folder: Path) -> Run:
    """The run in ``folder``; if it cannot be read its state is ``damaged``."""
    try:
        return _read(folder)
    except Exception as error:  # any error, so that the other runs are still compared
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
    """A key to sort names by the numbers in them: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _run_in(folder: Path, files: list[str]) -> Path | None:
    """The folder if it is one of a run, or for a skipped job that of the run which it would have repeated."""
    recorded = status.read(folder)
    if recorded.get("status") == "skipped":
        done = Path(str(recorded.get("done") or folder))
        return done if (done / "metrics.json").is_file() else None
    if (folder / ".hydra" / "config.yaml").is_file() or "metrics.json" in files or status.FILE in files:
        return folder
    return folder if "config.yaml" in files and read_config(folder) else None


def _state(
    folder: Path, config: Mapping[str, Any], written: dict[str, Any] | None, changed: float
) -> tuple[str, str]:
    """The state of a run, and the reason if it failed."""
    recorded, guess = status.read(folder), "running" if time.time() - changed < FRESH_S else "stopped"
    state = cleaned(recorded.get("status", guess if written is None else "finished"))
    if not config:
        return ("running" if state == "running" else "damaged"), "its config cannot be read"
    if state != "finished":
        return state, cleaned(str(recorded.get("reason", "")))
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
    """The curves of a resumed run, with the seconds of the training before its checkpoint added."""
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
