"""Folders of runs in every state that a run may be found in."""

import json
import os
import platform
import time

import pytest

from sglight.report.runs import find_runs, read_config, read_run
from tests.report.common import config, curve, results, write_run

HERE = {"host": platform.node(), "pid": os.getpid()}
LONG_AGO = time.time() - 86_400


def grow_old(folder):
    for path in folder.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))


def test_a_finished_run(tmp_path):
    run = read_run(write_run(tmp_path / "a", config("dni", seed=3), results(0.9), curve()))
    assert (run.state, run.reason, run.seed) == ("finished", "", 3)
    assert (run.config["dataset"], run.config["model"], run.config["strategy"]) == (
        "digits",
        "hamiltonian",
        "dni",
    )
    assert run.config["model.channels"] == [16, 32]
    assert run.metrics["test/acc"] == 0.9 and "run/status" not in run.metrics
    assert len(run.curves["val/acc"].step) == 5


@pytest.mark.parametrize(
    ("metrics", "status", "old", "state"),
    [
        (results(), {"status": "finished", **HERE}, True, "finished"),
        (results(test__loss=None), None, True, "diverged"),
        (results(val__loss=None), {"status": "finished", **HERE}, True, "diverged"),
        (None, {"status": "running", **HERE}, True, "running"),
        (None, {"status": "running", "host": platform.node(), "pid": 1 << 30}, False, "stopped"),
        (None, {"status": "failed", "reason": "UserError: no", **HERE}, False, "failed"),
        (None, {"status": "interrupted", "reason": "KeyboardInterrupt: ", **HERE}, False, "interrupted"),
        (results(), {"status": "failed", "reason": "it went on and failed", **HERE}, True, "failed"),
        (None, None, False, "running"),
        (None, None, True, "stopped"),
        ([1, 2], None, True, "damaged"),
        (None, {"status": "finished", **HERE}, True, "damaged"),
    ],
)  # fmt: skip
def test_states(tmp_path, metrics, status, old, state):
    folder = write_run(tmp_path / "a", config(), metrics, curve(), status=status)
    if old:
        grow_old(folder)
    assert read_run(folder).state == state


@pytest.mark.parametrize("part", [0, 0.3, 0.9])
def test_half_written_results_are_told_not_believed(tmp_path, part):
    folder = write_run(tmp_path / "a", config(), results(), curve())
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text[: int(part * len(text))])
    run = read_run(folder)
    assert (run.state, run.reason, run.metrics) == ("damaged", "metrics.json cannot be read", {})
    assert run.curves


@pytest.mark.parametrize("text", ["", "mode: [fit", "mode: fit\nseed: 1\n", "- 1\n", "a: \x00"])
def test_a_config_that_cannot_be_read(tmp_path, text):
    folder = write_run(tmp_path / "a", config(), results())
    (folder / "config.yaml").write_text(text)
    run = read_run(folder)
    assert run.state == "damaged" and "config" in run.reason and run.seed is None


def test_before_the_config_is_written_hydras_copy_is_read(tmp_path):
    folder = write_run(tmp_path / "a", config(), choices={"dataset": "digits"})
    settings = (folder / "config.yaml").read_text().replace("/somewhere", "${oc.env:HOME}")
    (folder / "config.yaml").unlink()
    (folder / ".hydra" / "config.yaml").write_text(settings)
    (run,) = find_runs([tmp_path])
    assert run.state == "running" and run.config["data_dir"] == "${oc.env:HOME}"


def test_the_names_are_those_of_the_command_line(tmp_path):
    choices = {"dataset": "mine", "model": "resnet", "strategy": "own", "experiment": "mnist_dense"}
    folder = write_run(tmp_path / "a", config(), choices=choices)
    assert {key: read_config(folder)[key] for key in choices} == choices
    without = write_run(tmp_path / "b", config("dni", model__dynamics="euler"))
    names = read_config(without)
    assert (names["dataset"], names["model"], names["strategy"]) == ("digits", "resnet", "dni")
    assert "experiment" not in names


def test_runs_are_found_at_any_depth_once_and_nothing_else(tmp_path):
    single = write_run(tmp_path / "2026-01-01" / "1-digits", config(), results())
    job = write_run(tmp_path / "multirun" / "2026-01-01" / "2" / "0-digits", config(), choices={})
    (job.parent / "multirun.yaml").write_text("hydra: {}")
    (single / "checkpoints").mkdir()
    conf = tmp_path / "conf"
    conf.mkdir()
    (conf / "config.yaml").write_text("defaults:\n  - dataset: digits\n")
    found = [run.folder for run in find_runs([tmp_path, single, tmp_path / "multirun"])]
    assert found == [single, job]


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        find_runs([tmp_path / "nowhere"])


def test_a_run_that_went_on_elsewhere_counts_the_time_before(tmp_path):
    """Its training took 10 s in all, of which its own events cover the last 4."""
    records = [("val/acc", 40, 0.0, 0.7), ("val/acc", 50, 4.0, 0.9)]
    went_on = write_run(tmp_path / "a", config(ckpt="old/last.ckpt"), results(time__fit_s=10.0), records)
    assert list(read_run(went_on).curves["val/acc"].elapsed) == [6.0, 10.0]
    (went_on / "metrics.json").unlink()
    assert not any(read_run(went_on).curves["val/acc"].elapsed > 0)


def test_numbers_of_unknown_keys_are_kept(tmp_path):
    metrics = results() | {
        "pvd/objective": 0.1,
        "level_2/steps": 16,
        "text": "x",
        "missing": None,
        "flag": {"a": 1},
    }
    run = read_run(write_run(tmp_path / "a", config(), metrics))
    assert run.metrics["pvd/objective"] == 0.1 and run.metrics["level_2/steps"] == 16.0
    assert not {"text", "missing", "flag"} & run.metrics.keys()
    json.dumps(dict(run.metrics), allow_nan=False)
