"""How fast a run was beside backpropagation: measured against the finished runs around it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from platform import python_version
from statistics import fmean
from typing import Any

from sglight.config.completed import results_below
from sglight.report.measures import RATE, Yardstick, is_yardstick, over_backprop
from sglight.report.reading import number, read_json
from sglight.report.runs import Run, read_config

MOST = 300  # runs that are looked at, the newest first


def measured_speedup(folder: Path, metrics: Mapping[str, Any], outputs: Path) -> float | None:
    """Samples a second over those of backpropagation on one worker with the same data, network and machine.

    Args:
        folder: of the run, with its config. metrics: its own.
        outputs: where to look for such runs, besides the folder's neighbours.

    Returns:
        None if there is none.
    """
    run = _run(folder, metrics)
    if run is None or RATE not in run.metrics:
        return None
    found = sorted(results_below(outputs, folder.parent), key=lambda path: path.stat().st_mtime, reverse=True)
    candidates = (_backprop(path) for path in islice(found, MOST) if path.parent != folder.resolve())
    yardsticks = [Yardstick(each) for each in candidates if each is not None and is_yardstick(each)]
    ratios = over_backprop([run], yardsticks)
    return fmean(ratios) if ratios else None


def versions() -> str:
    """What the results came from: ``sglight 1.0, torch 2.9, ...``."""
    packages = ("sglight", "torch", "pytorch-lightning")
    return ", ".join([*(f"{name} {_version(name)}" for name in packages), f"Python {python_version()}"])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "from a checkout"


def _backprop(path: Path) -> Run | None:
    """The run that has left this `metrics.json`, if it may be one of backpropagation."""
    metrics = read_json(path) or {}
    if metrics.get("run/status") != "finished":
        return None
    try:
        if "backprop" not in (path.parent / "config.yaml").read_text():  # much faster than to parse it
            return None
    except (OSError, UnicodeDecodeError):
        return None
    return _run(path.parent, metrics)


def _run(folder: Path, metrics: Mapping[str, Any]) -> Run | None:
    config = read_config(folder)
    numbers = {key: value for key, each in metrics.items() if (value := number(each)) is not None}
    machine = str(metrics.get("run/machine", ""))
    run = Run(folder, "finished", config=config, metrics=numbers, machine=machine)
    return run if config and not run.aside else None
