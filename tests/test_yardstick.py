"""The speed-up over backprop that a run tells is measured against the right runs, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sglight.yardstick import measured_speedup, versions
from tests.report.common import config, results, write_run


def one(folder: Path, strategy: str, rate: float, machine: str = "here", **keys: Any) -> dict[str, Any]:
    """A finished run; its metrics."""
    metrics = {**results(throughput__samples_per_s=rate), "run/machine": machine}
    write_run(folder, config(strategy, **keys), metrics)
    return metrics


def test_it_is_the_ratio_to_backprop_of_the_same_data_network_and_machine(tmp_path: Path) -> None:
    outputs, sweep = tmp_path / "outputs", tmp_path / "sweep"
    one(outputs / "day" / "a", "backprop", 100.0)
    one(sweep / "0", "backprop", 200.0, seed=2)
    one(outputs / "day" / "other network", "backprop", 1.0, model__steps=99)
    one(outputs / "day" / "other machine", "backprop", 2.0, machine="there")
    one(outputs / "day" / "two workers", "backprop", 3.0, trainer__devices=2)
    ours = one(sweep / "1", "dni", 300.0)
    assert measured_speedup(sweep / "1", ours, outputs) == pytest.approx(300 / 150)


def test_without_such_a_run_there_is_none(tmp_path: Path) -> None:
    ours = one(tmp_path / "sweep" / "1", "dni", 300.0)
    assert measured_speedup(tmp_path / "sweep" / "1", ours, tmp_path / "outputs") is None
    write_run(tmp_path / "sweep" / "failed", config(), {"run/status": "diverged"})
    assert measured_speedup(tmp_path / "sweep" / "1", ours, tmp_path / "outputs") is None


def test_versions_name_what_computes() -> None:
    assert "torch " in versions() and "Python 3." in versions()
