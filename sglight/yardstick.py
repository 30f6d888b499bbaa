"""The measured speed-up of a run over backpropagation, from finished runs of backpropagation on this machine."""

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

MOST = 300  # so many runs are searched, the newest first


def measured_speedup(folder: Path, metrics: Mapping[str, Any], outputs: Path) -> float | None:
    """The speed of a run relative to backpropagation on one worker with the same data, network and machine.

    Args:
        folder: of the run, with its config.
        metrics: of the run.
        outputs: a folder with earlier runs; those in neighbouring folders are searched as well.

    Returns:
        the ratio of samples a second; None if there is no such run of backpropagation.
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
    """The versions of the software: ``sglight 1.0, torch 2.9, ...``."""
    packages = ("sglight", "torch", "pytorch-lightning")
    return ", ".join([*(f"{name} {_version(name)}" for name in packages), f"Python {python_version()}"])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "from a checkout"


def _backprop(path: Path) -> Run | None:
    """The run of a `metrics.json`, if it is finished and may be one of backpropagation."""
    metrics = read_json(path) or {}
    if metrics.get("run/status") != "finished":
        return None
    try:
        if "backprop" not in (path.parent / "config.yaml").read_text():  # much faster than parsing it
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
