"""Times of epochs and of the training, over a resumption too."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglight.callbacks.checkpoint import LastCheckpoint
from sglight.callbacks.timing import EpochTimer
from tests.callbacks.common import fit


def test_epochs_are_within_the_training(tmp_path: Path) -> None:
    timer = EpochTimer()
    fit([timer], tmp_path, epochs=3)
    metrics = timer.metrics()
    assert len(timer.epoch_s) == 3
    assert 0 < metrics["time/epoch_s"] <= sum(timer.epoch_s) <= metrics["time/fit_s"]
    rates = sorted(120 / s for s in timer.epoch_s)
    assert metrics["throughput/samples_per_s"] == pytest.approx(rates[1])


def test_a_resumed_run_adds_up(tmp_path: Path) -> None:
    first, second = EpochTimer(), EpochTimer()
    fit([first, LastCheckpoint(tmp_path)], tmp_path, epochs=2)
    fit([second], tmp_path, epochs=3, ckpt=tmp_path / "last.ckpt")
    assert second.epoch_s[:2] == first.epoch_s
    assert len(second.epoch_s) == 3
    assert second.fit_s > sum(second.epoch_s)
