"""Times of epochs and of the training, over a resumption too."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from time import process_time, sleep
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import CSVLogger

from sglight.callbacks.checkpoint import LastCheckpoint
from sglight.callbacks.timing import EpochTimer
from tests.callbacks.common import data, fit


def test_epochs_are_within_the_training(tmp_path: Path) -> None:
    timer = EpochTimer()
    fit([timer], tmp_path, epochs=3)
    metrics = timer.metrics()
    assert len(timer.epoch_s) == 3
    assert 0 < metrics["time/epoch_s"] <= sum(timer.epoch_s) <= metrics["time/fit_s"]
    assert len(timer.validation_s) == len(timer.overhead_s) == 3
    assert sum(timer.epoch_s) + sum(timer.validation_s) + sum(timer.overhead_s) <= metrics["time/fit_s"]
    assert metrics["time/validation_s"] == sorted(timer.validation_s)[1]
    assert metrics["time/overhead_s"] == sorted(timer.overhead_s)[1]
    rates = sorted(120 / s for s in timer.epoch_s)
    assert metrics["throughput/samples_per_s"] == pytest.approx(rates[1])


class Slow(Callback):
    """Takes its time between the epochs, and in each validation."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sleep(0.2)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sleep(0.3)


def test_seconds_are_told_apart_and_logged(tmp_path: Path) -> None:
    timer = EpochTimer()
    fit([Slow(), timer], tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    assert min(timer.overhead_s) >= 0.2
    assert min(timer.validation_s) >= 0.3
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("epoch_s", "validation_s", "overhead_s"):
        written = [float(row[f"time/{name}"]) for row in rows if row[f"time/{name}"]]
        assert written == pytest.approx(getattr(timer, name), rel=1e-4)


def test_without_curves_nothing_is_logged(tmp_path: Path) -> None:
    trainer = fit([EpochTimer(curves=False)], tmp_path, logger=CSVLogger(tmp_path, name="", version=""))
    assert not {name for name in trainer.callback_metrics if re.fullmatch("time/[a-z]*_s", name)}
    assert "time/overhead_s" not in (tmp_path / "metrics.csv").read_text()


def test_a_resumed_run_adds_up(tmp_path: Path) -> None:
    first, second = EpochTimer(), EpochTimer()
    fit([first, LastCheckpoint(tmp_path)], tmp_path, epochs=2)
    fit([second], tmp_path, epochs=3, ckpt=tmp_path / "last.ckpt")
    assert second.epoch_s[:2] == first.epoch_s
    assert len(second.epoch_s) == 3
    assert second.fit_s > sum(second.epoch_s)
    assert second.cpu_s > first.cpu_s


class Busy(Callback):
    """Keeps the processor busy for a while, and then waits for longer."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        end = process_time() + 0.05
        while process_time() < end:
            pass
        sleep(0.2)


def test_waiting_is_no_time_of_the_processor(tmp_path: Path) -> None:
    timer = EpochTimer()
    trainer = fit([Busy(), timer], tmp_path)
    busy, waiting = 0.05 * trainer.global_step, 0.2 * trainer.global_step
    assert busy <= timer.metrics()["time/cpu_s"]
    assert timer.metrics()["time/fit_s"] - timer.cpu_s >= 0.9 * waiting


def test_a_trainer_that_goes_on_adds_to_what_it_has_measured(tmp_path: Path) -> None:
    timer = EpochTimer()
    trainer = fit([timer], tmp_path, epochs=2)
    before = timer.fit_s
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, data())
    assert len(timer.epoch_s) == 3 and timer.fit_s > before
    fit([timer], tmp_path, epochs=1)
    assert len(timer.epoch_s) == 1


@pytest.mark.parametrize("state", [{}, {"fit_s": 1.0, "epoch_s": [1.0]}])
def test_a_state_of_another_version_does_no_harm(tmp_path: Path, state: dict[str, Any]) -> None:
    timer = EpochTimer()
    timer.load_state_dict(state)
    fit([timer], tmp_path, epochs=1)
    assert timer.metrics()["time/fit_s"] > state.get("fit_s", 0.0)
    assert len(timer.epoch_s) == len(timer.epoch_samples) == 1
