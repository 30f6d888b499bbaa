"""How runs end: by signals, by numbers that are none, on a full disk, and where something else writes."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglight import experiment, results, signals, status
from sglight import start as start_module
from sglight.callbacks.checkpoint import LastCheckpoint
from sglight.callbacks.limits import Divergence
from sglight.config.composing import check
from sglight.errors import Diverged, Terminated, UserError
from sglight.output import Tolerant
from sglight.strategies.training import StagedTraining
from tests.test_experiment import metrics, weights


def state(folder: Path) -> str:
    return str(json.loads((folder / "status.json").read_text())["status"])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def answered():
    """Signals are answered as in the command."""
    before = signals.answer()
    yield
    signals.answer()
    signals.restore(before)


@pytest.mark.parametrize("strategy", ["backprop", "dni", "delayed", "multilevel", "pvd"])
def test_a_run_that_is_asked_to_end_writes_a_checkpoint_and_goes_on_bit_for_bit(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: None, strategy: str
) -> None:
    common = (f"strategy={strategy}", "trainer.max_epochs=2", "dataset.batch_size=16")
    start(tmp_path / "whole", *common)
    end_batch = StagedTraining.end_batch

    def killed(self: Any, *args: Any, **kwargs: Any) -> None:
        end_batch(self, *args, **kwargs)
        if self.current_epoch == 1 and self.runtime.batch == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(StagedTraining, "end_batch", killed)
    with pytest.raises(Terminated):
        start(tmp_path / "killed", *common)
    monkeypatch.setattr(StagedTraining, "end_batch", end_batch)
    assert state(tmp_path / "killed") == "interrupted"
    assert not list((tmp_path / "killed").rglob("*.tmp"))
    ckpt = tmp_path / "killed/checkpoints/last.ckpt"
    assert torch.load(ckpt, weights_only=True)["global_step"] == 8
    signals.answer()
    start(tmp_path / "killed", *common, f"ckpt={ckpt}")
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(a[name], b[name]) for name in a)
    whole, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    for name in ("test/acc", "test/loss", "val/acc", "train/loss", "run/steps", "run/config_hash"):
        assert whole[name] == resumed[name], name


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_in_a_process_of_its_own(tmp_path: Path, signum: int, code: int) -> None:
    script = (
        "import sys, time, types; m = types.ModuleType('sglight.experiment'); "
        "m.run = lambda *_: (print('go', flush=True), time.sleep(60)); sys.modules[m.__name__] = m; "
        "from sglight.__main__ import main; sys.argv = ['sglight', 'hydra.run.dir=here']; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        process.send_signal(signum)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, state(tmp_path / "here")) == (code, "interrupted")
    assert err.startswith("interrupted in ") and len(err.splitlines()) == 1


def test_a_signal_behind_the_last_checkpoint_ends_the_run(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: None
) -> None:
    epoch_end = LastCheckpoint.on_train_epoch_end

    def killed(self: Any, trainer: Any, module: Any) -> None:
        epoch_end(self, trainer, module)
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(LastCheckpoint, "on_train_epoch_end", killed)
    common = ("strategy=dni", "trainer.max_epochs=2")
    with pytest.raises(Terminated):
        start(tmp_path, *common)
    assert state(tmp_path) == "interrupted" and not (tmp_path / "metrics.json").exists()
    monkeypatch.undo()
    signals.answer()
    start(tmp_path, *common, f"ckpt={tmp_path}/checkpoints/last.ckpt")
    assert state(tmp_path) == "finished" and "test/acc" in metrics(tmp_path)


@pytest.mark.parametrize("moment", ["write_metrics", "finish_loggers"])
def test_a_signal_while_the_results_are_written_lets_them_be_written(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answered: None, moment: str
) -> None:
    module = results if moment == "write_metrics" else experiment
    whole = getattr(module, moment)

    def killed(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        whole(*args)

    monkeypatch.setattr(module, moment, killed)
    assert start(tmp_path, "trainer.max_epochs=1") == metrics(tmp_path)["run/monitored"]
    assert state(tmp_path) == "finished"
    with pytest.raises(Terminated):
        signals.release()


def test_workers_that_were_asked_to_end_while_they_wrote_the_results_have_finished(
    tmp_path: Path, compose_config, monkeypatch: pytest.MonkeyPatch, answered: None
) -> None:
    def launch(function: Any, *args: Any, **_: Any) -> None:
        if function is start_module._run:
            (tmp_path / "metrics.json").write_text('{"run/monitored": 0.75}')
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(start_module.launcher, "launch", launch)
    cfg = compose_config("trainer.devices=2")
    assert start_module.run(cfg, tmp_path) == 0.75
    assert state(tmp_path) == "finished"


def test_results_of_an_earlier_run_do_not_make_an_interrupted_one_finished(
    tmp_path: Path, compose_config, monkeypatch: pytest.MonkeyPatch, answered: None
) -> None:
    (tmp_path / "metrics.json").write_text('{"run/monitored": 0.75}')
    monkeypatch.setattr(
        start_module.launcher, "launch", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(Terminated):
        start_module.run(compose_config("trainer.devices=2"), tmp_path)
    assert state(tmp_path) == "interrupted"


def test_a_training_that_diverges_ends_at_once_and_leaves_the_best_as_it_was(start, tmp_path: Path) -> None:
    common = ("strategy.optimizer.name=sgd", "model.activation=relu")
    start(tmp_path, *common, "trainer.max_epochs=1")
    best = (tmp_path / "checkpoints/best.ckpt").read_bytes()
    ckpt = f"ckpt={tmp_path}/checkpoints/last.ckpt"
    with pytest.raises(Diverged, match=r"epoch \d; lower strategy\.optimizer\.lr"):
        start(tmp_path, *common, "trainer.max_epochs=9", ckpt, "strategy.optimizer.lr=1e6")
    assert (tmp_path / "checkpoints/best.ckpt").read_bytes() == best
    assert state(tmp_path) == "diverged"
    found = metrics(tmp_path)
    assert (found["run/status"], found["run/monitored"]) == ("diverged", None)


def test_a_loss_that_has_exploded_is_warned_of_once() -> None:
    callback, module = Divergence(), torch.nn.Linear(2, 2)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for epoch, loss in enumerate((2.0, 1.9e6, 2.1e6, 3e6)):
            trainer = SimpleNamespace(callback_metrics={"train/loss": loss}, current_epoch=epoch)
            callback.on_train_epoch_end(trainer, module)  # type: ignore[arg-type]
            assert len(heard) == (epoch >= 2)
    assert re.search(r"from 2 to 2\.1e\+06 by epoch 2; lower strategy\.optimizer\.lr", str(heard[0].message))


def test_a_filter_larger_than_the_picture_is_refused(compose_config, tmp_path: Path) -> None:
    cfg = compose_config("dataset=digits", "strategy=backprop", "model.kernel=conv", "model.kernel_size=9")
    with pytest.raises(UserError, match=r"model\.kernel_size=9 is larger than the pictures, 8 x 8; lower it"):
        start_module.run(check(cfg), tmp_path)


def test_a_script_from_stdin_cannot_start_workers() -> None:
    script = "from sglight.parallel.launcher import launch; launch(print, workers=2)"
    done = subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "by a script from <stdin>, which is no file: save it as one, or train in one" in done.stderr


def test_a_rate_that_overflows_is_a_divergence(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*_: Any, **__: Any) -> None:
        float(10**400)

    monkeypatch.setattr(StagedTraining, "end_batch", overflow)
    with pytest.raises(Diverged, match=r"lower strategy\.scheduler\.gamma"):
        start(tmp_path)


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, "trainer.max_epochs=1")
    before = (tmp_path / "checkpoints/last.ckpt").read_bytes()
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed"),
    ):

        def full(self: Any, path: Any, error: Exception = error, **_: Any) -> None:
            Path(path).write_bytes(b"half")
            raise error

        monkeypatch.setattr("pytorch_lightning.Trainer.save_checkpoint", full)
        with pytest.raises(UserError, match=r"cannot be written: .*; make room there, or .* hydra\.run\.dir"):
            start(tmp_path, "trainer.max_epochs=2", f"ckpt={tmp_path}/checkpoints/last.ckpt")
        assert (tmp_path / "checkpoints/last.ckpt").read_bytes() == before
        assert not list(tmp_path.rglob("*.tmp"))
        monkeypatch.undo()


def test_the_status_is_written_even_where_no_new_file_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RuntimeError), status.recorded(tmp_path):  # noqa: PT012
        monkeypatch.setattr("sglight.status.replacing", full)
        raise RuntimeError("a bug")
    assert state(tmp_path) == "failed"


def test_a_folder_has_one_writer(start, tmp_path: Path) -> None:
    with status.recorded(tmp_path):
        before = contents(tmp_path)
        with pytest.raises(
            UserError, match=rf"process {os.getpid()} on .* wait for its end, or give another"
        ):
            start(tmp_path)
        assert contents(tmp_path) == before
    with status.recorded(tmp_path):
        pass


def test_a_process_with_the_number_of_a_run_is_not_taken_for_it(tmp_path: Path) -> None:
    with status.recorded(tmp_path):
        told = json.loads((tmp_path / "status.json").read_text())
        assert status.read(tmp_path)["status"] == "running"
        (tmp_path / "status.json").write_text(json.dumps(told | {"started": told["started"] - 1}))
        assert status.read(tmp_path)["status"] == "stopped"


def test_a_refused_command_changes_nothing_of_a_finished_run(start, tmp_path: Path) -> None:
    start(tmp_path)
    before = contents(tmp_path)
    for change in ("dataset.validation_fraction=0.1", "trainer.accelerator=gpu"):
        change = change if "accel" in change else "dataset.train_points=1"
        with pytest.raises(UserError):
            start(tmp_path, change)
        assert contents(tmp_path) == before


def test_variables_that_a_scheduler_has_left_do_not_matter(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "x"}.items():
        monkeypatch.setenv(name, value)
    start(tmp_path, "trainer.max_epochs=1")
    assert list(tmp_path.glob("events.*")) and metrics(tmp_path)["run/workers"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's")
def test_output_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    stream = Tolerant(open("/dev/full", "wb"), "ascii", "replace", line_buffering=True)  # noqa: SIM115
    for text in ("─ a line\n", "another\n", "x" * 99999):
        stream.write(text)
        stream.flush()
    stream.close()
    with Tolerant((tmp_path / "out").open("wb"), "ascii", "replace") as stream:
        stream.write("─ 1\n")
    assert (tmp_path / "out").read_text() == "? 1\n"
