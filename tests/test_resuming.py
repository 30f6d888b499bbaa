"""Runs that go on from a checkpoint: what wins, what is refused, and what is done of a run that was killed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from sglight import start as start_module
from sglight.archive import read_record
from sglight.config.composing import check
from sglight.errors import UserError
from tests.test_experiment import SMALL, metrics, weights


def last(folder: Path) -> str:
    return f"ckpt={folder / 'checkpoints/last.ckpt'}"


def groups(folder: Path) -> dict[str, Any]:
    states = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["optimizer_states"]
    found: dict[str, Any] = states["stage_0"]["param_groups"][0]
    return found


def test_a_checkpoint_says_of_which_run_and_data_it_is(start, tmp_path: Path) -> None:
    start(tmp_path)
    record = read_record(tmp_path / "checkpoints/best.ckpt", "it")
    assert record["config"]["model"]["channels"] == 4
    assert record["hash"] == metrics(tmp_path)["run/config_hash"]
    assert (record["data"]["shape"], record["data"]["class_names"]) == ([2], ["inner", "outer"])


def test_rates_on_the_command_line_win(start, tmp_path: Path) -> None:
    start(tmp_path / "a", "strategy.scheduler.name=step", "strategy.scheduler.step_epochs=9")
    rates = (
        "strategy.optimizer.lr=0.5",
        "strategy.optimizer.weight_decay=0.25",
        "strategy.scheduler.gamma=0.5",
    )
    start(
        tmp_path / "b", last(tmp_path / "a"), *rates, "strategy.scheduler.name=step",
        "strategy.scheduler.step_epochs=2", "trainer.max_epochs=3",
    )  # fmt: skip
    found = groups(tmp_path / "b")
    assert (found["lr"], found["initial_lr"], found["weight_decay"]) == (0.25, 0.5, 0.25)
    assert metrics(tmp_path / "b")["run/config_hash"] != metrics(tmp_path / "a")["run/config_hash"]


def test_patience_on_the_command_line_wins(start, tmp_path: Path) -> None:
    stop = ("callbacks.early_stopping.enabled=true", "strategy.scheduler.name=plateau")
    start(tmp_path / "a", *stop, "callbacks.early_stopping.patience=90")
    start(
        tmp_path / "b", last(tmp_path / "a"), *stop, "callbacks.early_stopping.patience=1",
        "strategy.scheduler.patience=0", "trainer.max_epochs=30", "strategy.optimizer.lr=1e-6",
    )  # fmt: skip
    assert metrics(tmp_path / "b")["run/epochs"] < 6
    found = groups(tmp_path / "b")
    assert found["initial_lr"] == 1e-6 and found["lr"] < 1e-6, "the schedule has lost its patience, too"


@pytest.mark.parametrize("mode", ["fit", "test"])
def test_other_data_of_equal_shape_are_refused(start, compose_config, tmp_path: Path, mode: str) -> None:
    data = []
    for name in ("one", "two"):
        generator = np.random.default_rng(len(data))
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"], file["y"] = generator.standard_normal((60, 5)), np.arange(60) % 2
        data.append(("dataset=hdf5", f"dataset.path={tmp_path}/{name}.h5", "dataset.batch_size=16"))
    common = [o for o in SMALL if not o.startswith("dataset")]

    def run(folder: Path, *overrides: str) -> None:
        start_module.run(check(compose_config(*common, "strategy=backprop", *overrides)), folder)

    run(tmp_path / "a", *data[0])
    with pytest.raises(UserError, match=r"last\.ckpt was trained on other data: .*dataset="):
        run(tmp_path / "b", *data[1], f"mode={mode}", last(tmp_path / "a"), "trainer.max_epochs=3")


def test_a_run_that_was_killed_behind_its_last_epoch_gets_its_results(start, tmp_path: Path) -> None:
    value = start(tmp_path / "a")
    whole = metrics(tmp_path / "a")
    # One of an earlier part of the training is no result of the whole.
    (tmp_path / "a/metrics.json").write_text('{"run/epochs": 1}')
    assert start(tmp_path / "a", last(tmp_path / "a")) == value
    now = metrics(tmp_path / "a")
    for name, number in whole.items():
        if not name.startswith(("time/", "memory/", "throughput/")):
            assert now[name] == number, name
    assert now["time/fit_s"] > 0
    with pytest.raises(UserError, match="has trained 2 epochs already"):
        start(tmp_path / "a", last(tmp_path / "a"))


def test_a_run_that_was_stopped_early_and_killed_does_not_train_again(start, tmp_path: Path) -> None:
    stopping = ("callbacks.early_stopping.enabled=true", "callbacks.early_stopping.patience=1")
    slow = ("strategy.optimizer.lr=1e-9", "trainer.max_epochs=9")
    start(tmp_path / "a", *stopping, *slow)
    before = weights(tmp_path / "a")
    epochs = metrics(tmp_path / "a")["run/epochs"]
    (tmp_path / "a/metrics.json").unlink()
    start(tmp_path / "a", *stopping, *slow, last(tmp_path / "a"))
    assert metrics(tmp_path / "a")["run/epochs"] == epochs < 9
    assert all(torch.equal(before[name], value) for name, value in weights(tmp_path / "a").items())


def test_time_counts_from_each_start_and_no_batch_is_no_run(start, tmp_path: Path, monkeypatch) -> None:
    start(tmp_path / "a", "trainer.max_time=00:00:00:09")
    monkeypatch.setattr("sglight.callbacks.limits.TimeLimit.time_elapsed", lambda *_: 5.0)
    start(tmp_path / "a", "trainer.max_time=00:00:00:06", "trainer.max_epochs=3", last(tmp_path / "a"))
    before = (tmp_path / "a/metrics.json").read_bytes()
    with pytest.raises(UserError, match=r"max_time was over before the first batch"):
        start(tmp_path / "a", "trainer.max_time=00:00:00:04", "trainer.max_epochs=5", last(tmp_path / "a"))
    assert (tmp_path / "a/metrics.json").read_bytes() == before
    assert json.loads((tmp_path / "a/status.json").read_text())["status"] == "finished"


def test_the_csv_log_keeps_its_earlier_rows(start, tmp_path: Path) -> None:
    start(tmp_path, "logger=csv", "trainer.log_every_n_steps=1")
    start(tmp_path, "logger=csv", "trainer.log_every_n_steps=1", "trainer.max_epochs=4", last(tmp_path))
    with (tmp_path / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(8))


def test_a_damaged_best_is_not_taken_over(start, tmp_path: Path) -> None:
    start(tmp_path, "trainer.max_epochs=1")
    best = tmp_path / "checkpoints/best.ckpt"
    data = bytearray(best.read_bytes())
    data[len(data) // 2] ^= 1
    best.write_bytes(data)
    start(tmp_path, "trainer.max_epochs=2", last(tmp_path))
    assert torch.load(best, weights_only=True)["epoch"] == 1
