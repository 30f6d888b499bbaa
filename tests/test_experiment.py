"""Whole runs: what they leave, how they go on, and every preset."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sglight import building, experiment, process
from sglight import start as start_module
from sglight.config.completed import config_hash, find_completed
from sglight.config.composing import CONF, check, to_plain
from sglight.data.arrays import HDF5Data
from sglight.errors import UserError
from sglight.loggers import beginning
from sglight.report.events import read_curves
from sglight.strategies.dni import DNI

Compose = Callable[..., DictConfig]
SMALL = (
    "dataset=ellipse", "dataset.train_points=90", "dataset.val_points=30", "dataset.test_points=30",
    "model.channels=4", "model.steps=4", "trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.threads=1",
    "callbacks.progress.enabled=false",
)  # fmt: skip
PICTURES = ("figures", "timeline", "gradient_quality")
PLAIN, DRAWING = (
    tuple(f"callbacks.{name}.enabled={enabled}" for name in PICTURES) for enabled in ("false", "true")
)
SMALL += PLAIN
STRATEGIES = ("backprop", "delayed", "dni", "multilevel", "pvd")
PROMISED = {
    "test/acc", "test/loss", "val/acc", "time/fit_s", "time/epoch_s", "throughput/samples_per_s", "memory/peak_bytes",
    "model/parameters", "run/stages", "run/workers", "run/seed", "run/config_hash", "run/monitored",
}  # fmt: skip


@pytest.fixture
def start(compose_config: Compose) -> Callable[..., float]:
    """``start(folder, *overrides)`` does a small run."""

    def run(folder: Path, *overrides: str, small: tuple[str, ...] = SMALL) -> float:
        return start_module.run(check(compose_config(*small, *overrides)), folder)

    return run


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    found: dict[str, torch.Tensor] = checkpoint["state_dict"]
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_leaves_what_is_promised(start: Callable[..., float], tmp_path: Path, strategy: str) -> None:
    options = ("trainer.max_epochs=3", "trainer.log_every_n_steps=1")
    value = start(tmp_path, f"strategy={strategy}", *options, *DRAWING)
    found = metrics(tmp_path)
    assert found.keys() >= PROMISED
    assert ("speedup/theoretical" in found) == (strategy != "backprop")
    assert value == found["val/acc"]
    assert found["run/steps"] == 3 * 2  # batches, whatever the number of optimisers
    assert (tmp_path / "config.yaml").is_file()
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert len(list((tmp_path / "figures").glob("*.png"))) >= 2
    assert not list(tmp_path.rglob("*.tmp"))
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "test/acc", "lr/stage_0"} <= set(
        tags["scalars"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3, 4, 5]
    assert any(tag.startswith("_hparams_") for tag in events.summary_metadata)
    assert tags["images"]


def test_what_is_measured_beside_the_training_is_a_choice(
    start: Callable[..., float], tmp_path: Path
) -> None:
    names = ("figures", "gradient_quality", "stability", "timeline", "timing", "memory")
    found = {}
    for enabled in ("true", "false"):
        folder = tmp_path / enabled
        choices = [f"callbacks.{name}.enabled={enabled}" for name in names]
        start(
            folder,
            *choices,
            "strategy=dni",
            "strategy.diagnose_every_n_batches=1",
            "trainer.log_every_n_steps=1",
        )
        tags = EventAccumulator(str(folder)).Reload().Tags()["scalars"]
        figures = {path.stem for path in (folder / "figures").glob("*.png")}
        found[enabled] = figures, set(metrics(folder)) | set(tags), weights(folder)
    (all_figures, measured, a), (no_figures, bare, b) = found["true"], found["false"]
    pictures = {"decision", "trajectories", "gradient_quality", "stage_gradients", "stability", "timeline"}
    assert all_figures == pictures
    assert not no_figures
    assert {
        "stability/growth",
        "stability/step_3/sigma_max",
        "time/overhead_s",
        "memory/peak_bytes",
    } <= measured
    assert not any(name.startswith("stability/") for name in bare)
    assert bare >= PROMISED
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_hash_is_that_of_the_config_and_the_monitored_metric_is_what_is_returned(
    start: Callable[..., float], compose_config: Compose, tmp_path: Path
) -> None:
    monitor = ("callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min")
    value = start(tmp_path / "outputs/day/run", *monitor)
    found = metrics(tmp_path / "outputs/day/run")
    plain = to_plain(check(compose_config(*SMALL, *monitor)))
    assert found["run/config_hash"] == config_hash(plain)
    assert find_completed(plain, tmp_path / "outputs") == (tmp_path / "outputs/day/run", value)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    start: Callable[..., float], tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        start(tmp_path / name, f"seed={seed}")
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_ends_bit_identical(start: Callable[..., float], tmp_path: Path, strategy: str) -> None:
    common = [f"strategy={strategy}", "strategy.scheduler.name=step", "strategy.scheduler.step_epochs=1"]
    if strategy == "multilevel":
        # Otherwise the first part would be a shorter training of its own, not an interrupted one.
        common.append("strategy.level.epochs=[1,null]")
    start(tmp_path / "straight", *common, "trainer.max_epochs=4")
    start(tmp_path / "first", *common, "trainer.max_epochs=2")
    ckpt = tmp_path / "first/checkpoints/last.ckpt"
    start(tmp_path / "second", *common, "trainer.max_epochs=4", f"ckpt={ckpt}")
    straight, second = weights(tmp_path / "straight"), weights(tmp_path / "second")
    assert straight.keys() == second.keys()
    assert all(torch.equal(straight[name], second[name]) for name in straight)
    for name in ("test/acc", "test/loss", "val/acc", "run/steps"):
        assert metrics(tmp_path / "straight")[name] == metrics(tmp_path / "second")[name]


def test_measured_cuts_are_kept(
    start: Callable[..., float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the config and in checkpoints: a training that goes on does not measure again."""
    measured = iter([(0, 1, 4)])
    monkeypatch.setattr(building, "measured_cuts", lambda *_: next(measured))
    options = ("strategy=delayed", "strategy.balance=measured")
    start(tmp_path / "first", *options)
    start(
        tmp_path / "second", *options, "trainer.max_epochs=3", f"ckpt={tmp_path}/first/checkpoints/last.ckpt"
    )
    for name in ("first", "second"):
        assert OmegaConf.load(tmp_path / name / "config.yaml").strategy.cuts == [1]
        checkpoint = torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)
        assert checkpoint["sglight"]["strategy.cuts"] == [1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processors_on_two_workers_leave_what_they_leave_on_one(
    start: Callable[..., float], tmp_path: Path
) -> None:
    for workers in (1, 2):
        start(tmp_path / str(workers), "strategy=pvd", f"trainer.devices={workers}")
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for name in (
        "test/acc",
        "test/loss",
        "val/loss",
        "run/steps",
        *(key for key in one if key.startswith("pvd/")),
    ):
        assert one[name] == two[name], name
    a, b = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_mode_test_evaluates_only(start: Callable[..., float], tmp_path: Path) -> None:
    start(tmp_path / "fit")
    ckpt = tmp_path / "fit/checkpoints/best.ckpt"
    before = ckpt.read_bytes()
    value = start(tmp_path / "test", "mode=test", f"ckpt={tmp_path}/fit")
    assert f"ckpt: {ckpt}\n" in (tmp_path / "test/config.yaml").read_text(), "the one that the run tested"
    assert value == metrics(tmp_path / "fit")["test/acc"] == metrics(tmp_path / "test")["test/acc"]
    assert ckpt.read_bytes() == before
    assert not (tmp_path / "test/checkpoints").exists()


def test_resuming_a_finished_run_says_what_to_change(start: Callable[..., float], tmp_path: Path) -> None:
    start(tmp_path / "fit")
    with pytest.raises(UserError, match=r"trainer\.max_epochs"):
        start(tmp_path / "again", f"ckpt={tmp_path / 'fit/checkpoints/last.ckpt'}")


@pytest.mark.parametrize(
    ("change", "key"),
    [("model.channels=6", r"model\.channels"), ("strategy=backprop", "strategy"), ("model=resnet", "model")],
)
def test_a_checkpoint_of_another_network_is_refused(
    start: Callable[..., float], tmp_path: Path, change: str, key: str
) -> None:
    start(tmp_path / "fit")
    with pytest.raises(UserError, match=key):
        start(
            tmp_path / "again",
            change,
            f"ckpt={tmp_path / 'fit/checkpoints/last.ckpt'}",
            "trainer.max_epochs=9",
        )


@pytest.mark.parametrize("epochs", ["4,2", "5,1"])
def test_accuracy_is_that_of_the_finest_network(
    start: Callable[..., float], tmp_path: Path, epochs: str
) -> None:
    change = (
        "trainer.max_epochs=6",
        f"strategy.level.epochs=[{epochs}]",
        "trainer.check_val_every_n_epoch=4",
    )
    # Validated after the coarse level's fourth epoch only.
    start(tmp_path / "fit", "strategy=multilevel", *change)
    found = metrics(tmp_path / "fit")
    assert found["run/monitored"] == found["val/acc"]
    assert found["val/loss"] != found["level_0/val_loss"]
    start(tmp_path / "test", "strategy=multilevel", "mode=test", f"ckpt={tmp_path}/fit/checkpoints/last.ckpt")
    assert metrics(tmp_path / "test")["test/acc"] == found["test/acc"]


def test_a_coarse_network_that_is_stopped_early_is_refined(
    start: Callable[..., float], tmp_path: Path
) -> None:
    stopping = ("enabled=true", "monitor=level", "patience=2")
    start(
        tmp_path, "strategy=multilevel", "trainer.max_epochs=8", "strategy.level.epochs=[4,4]",
        *(f"callbacks.early_stopping.{setting}" for setting in stopping),
    )  # fmt: skip
    # A level is new in its first epoch, and no higher in the two behind it.
    found = metrics(tmp_path)
    assert [found[f"level_{k}/epochs"] for k in (0, 1)] == [1 + 2, 1 + 2]
    assert found["run/epochs"] == 6


@pytest.mark.parametrize(
    ("begun", "change", "key"),
    [
        ("pvd", "strategy.local_solver=lbfgs", "local_solver=first_order, not lbfgs"),
        ("pvd", "strategy.forget_me_not=false", "forget_me_not=True, not False"),
        ("pvd", "strategy.processors=3", "processors=2, not 3"),
        ("dni", "strategy.optimizer.name=sgd", "optimizer.name=adam, not sgd"),
        ("dni", "strategy.estimator.optimizer.name=sgd", "estimator.optimizer.name=adam, not sgd"),
        ("backprop", "strategy.scheduler.name=plateau", "scheduler.name=none, not plateau"),
    ],
)
def test_a_training_goes_on_with_its_own_solver_only(
    start: Callable[..., float], tmp_path: Path, begun: str, change: str, key: str
) -> None:
    start(tmp_path / "fit", f"strategy={begun}")
    ckpt = f"ckpt={tmp_path / 'fit/checkpoints/last.ckpt'}"
    with pytest.raises(UserError, match=key):
        start(tmp_path / "again", f"strategy={begun}", change, ckpt, "trainer.max_epochs=9")
    if "processors" not in change:
        start(tmp_path / "test", f"strategy={begun}", change, ckpt, "mode=test")


def test_a_broken_checkpoint_is_named(start: Callable[..., float], tmp_path: Path) -> None:
    broken = tmp_path / "broken.ckpt"
    for mode in ("fit", "test"):
        if mode == "fit":
            broken.write_bytes(b"PK\x03\x04 no checkpoint")
        else:
            torch.save([1, 2], broken)
        with pytest.raises(UserError, match=r"broken\.ckpt"):
            start(tmp_path / mode, f"mode={mode}", f"ckpt={broken}")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    experiment.write_atomically(path, "old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        experiment.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_one_thread_for_small_steps_a_share_of_the_cores_for_large_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglight.networks import NetworkSpec

    small = NetworkSpec((64,), 10, channels=64)
    large = NetworkSpec((1, 28, 28), 10, kernel="conv", channels=16)
    monkeypatch.setattr(process, "cores", lambda: 6)
    assert process.useful_threads(small, 64) == 1
    assert [process.useful_threads(large, 128, workers) for workers in (1, 2, 4, 9)] == [6, 3, 1, 1]
    assert process.useful_threads(large, 1) == 1


PRESETS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
TUNED = [
    (name[0], f"{group}={name[2]}")
    for group, folder in (("strategy", "tuned"), ("model", "by_model"))
    for path in sorted((CONF / "experiment" / folder).glob("*.yaml"))
    if (name := path.stem.rpartition("_"))
]


@pytest.mark.parametrize(("preset", "choice"), [*((preset, "") for preset in PRESETS), *TUNED])
def test_every_preset_takes_a_step(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, choice: str
) -> None:
    shapes = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
    levels = "multilevel" in choice or (
        not choice and preset in ("warm_start", "multilevel_dni", "multilevel_mnist")
    )
    chosen = (f"experiment={preset}", *filter(None, [choice]))
    epochs = compose_config(*chosen).strategy.levels if levels else 1  # one a level
    cfg = compose_config(
        *chosen, f"trainer.max_epochs={epochs}",
        "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1",
        "trainer.accelerator=cpu", "callbacks.progress.enabled=false", "dataset.batch_size=8", *PLAIN,
        *(["strategy.objective_samples=8"] if choice == "strategy=pvd" else []),
    )  # fmt: skip
    if (shape := shapes.get(cfg.dataset.name)) is not None:
        # The presets' pictures may not be at hand; noise of their shape is.
        monkeypatch.setattr(
            experiment, "build_datamodule", lambda *_, **__: noise(tmp_path / "noise.h5", shape)
        )
    start_module.run(check(cfg), tmp_path / "run")
    assert metrics(tmp_path / "run")["run/steps"] == epochs


def noise(path: Path, shape: tuple[int, ...]) -> HDF5Data:
    """A data module of random pictures in ten classes."""
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["x"] = generator.integers(0, 256, (200, *shape), dtype=np.uint8)
        file["y"] = np.arange(200) % 10
    datamodule = HDF5Data(path=str(path), batch_size=8, seed=1, layout="channels_first")
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


@pytest.mark.parametrize("name", ["tensorboard", "csv", "none"])
def test_every_logger(start: Callable[..., float], tmp_path: Path, name: str) -> None:
    start(tmp_path, f"logger={name}")
    assert metrics(tmp_path)["run/epochs"] == 2


@pytest.mark.parametrize("preset", sorted(path.stem for path in (CONF / "debug").glob("*.yaml")))
def test_every_debug_preset(start: Callable[..., float], tmp_path: Path, preset: str) -> None:
    short = ["trainer.max_epochs=2"] if preset == "overfit" else []
    start(tmp_path, f"debug={preset}", "callbacks.progress.enabled=false", *short, small=())
    assert (tmp_path / "metrics.json").is_file() == (preset != "fast")


def test_without_a_validation_the_network_is_validated_at_the_end(
    start: Callable[..., float], tmp_path: Path
) -> None:
    value = start(tmp_path, "trainer.check_val_every_n_epoch=5")
    assert value == metrics(tmp_path)["val/acc"]
    assert "test/acc" in metrics(tmp_path)


def test_val_metrics_are_all_of_the_best_epoch(start: Callable[..., float], tmp_path: Path) -> None:
    value = start(
        tmp_path, "trainer.max_epochs=6", "callbacks.checkpoint.monitor=val/loss", "callbacks.checkpoint.mode=min",
        "strategy.optimizer.lr=0.3",
    )  # fmt: skip
    found = metrics(tmp_path)
    assert value == found["val/loss"] <= found["val/loss_last"]
    saved = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)["callbacks"]["BestCheckpoint"]
    assert saved["best_metrics"] == {"val/acc": found["val/acc"], "val/loss": found["val/loss"]}


def test_a_last_batch_of_one_sample(start: Callable[..., float], tmp_path: Path) -> None:
    start(tmp_path, "dataset.train_points=65", "model.normalisation=batch", "strategy=dni", "strategy.lag=3")
    assert metrics(tmp_path)["run/steps"] == 4


def test_an_unknown_metric_to_stop_by_is_one_sentence(start: Callable[..., float], tmp_path: Path) -> None:
    stop = ("callbacks.early_stopping.enabled=true", "callbacks.early_stopping.monitor=val/accuracy")
    with pytest.raises(UserError, match=r"callbacks\.early_stopping\.monitor"):
        start(tmp_path, *stop)


def test_a_run_stopped_in_mid_epoch_repeats_it(
    start: Callable[..., float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("strategy=dni", "trainer.max_epochs=3", "dataset.train_points=300")
    start(tmp_path / "straight", *common)
    step = DNI.training_step

    def stopped(self: DNI, batch: Any, batch_idx: int) -> None:
        step(self, batch, batch_idx)
        if self.current_epoch == 1 and batch_idx == 2:
            self.trainer.should_stop = True

    monkeypatch.setattr(DNI, "training_step", stopped)
    start(tmp_path / "first", *common)
    monkeypatch.setattr(DNI, "training_step", step)
    start(tmp_path / "second", *common, f"ckpt={tmp_path / 'first/checkpoints/last.ckpt'}")
    straight, second = weights(tmp_path / "straight"), weights(tmp_path / "second")
    assert all(torch.equal(straight[name], second[name]) for name in straight)


@pytest.mark.slow
def test_the_default_run_learns_the_digits(compose_config: Compose, tmp_path: Path) -> None:
    start_module.run(check(compose_config("callbacks.progress.enabled=false")), tmp_path)
    assert metrics(tmp_path)["test/acc"] >= 0.95


@pytest.mark.parametrize(
    ("gpus", "share", "message"),
    [
        (0, False, "no GPU; use trainer.accelerator=cpu"),
        (0, True, "no GPU"),
        (1, False, r"1 GPU\(s\).*share_devices"),
    ],
)
def test_more_workers_than_gpus_are_refused(
    compose_config: Compose,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gpus: int,
    share: bool,
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    overrides = ("trainer.accelerator=gpu", "trainer.devices=2", f"trainer.share_devices={share}")
    plain = to_plain(compose_config(*overrides))
    with pytest.raises(UserError, match=message):
        experiment.build_trainer(plain, tmp_path, [])


def test_a_callback_from_outside_and_several_loggers(start, tmp_path, monkeypatch):
    (tmp_path / "outside.py").write_text(
        "from pytorch_lightning.callbacks import Callback\n"
        "class Counts(Callback):\n"
        "    def __init__(self, first=0): self.count = first\n"
        "    def on_train_batch_end(self, *_): self.count += 1\n"
        "    def metrics(self): return {'mine/batches': self.count}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = "+callbacks.mine={_target_: outside.Counts, first: 5}"
    start(tmp_path, mine, "logger=[tensorboard,csv]", "callbacks.early_stopping.enabled=true")
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["mine/batches"] == 5 + found["run/steps"]
    curves = read_curves(tmp_path)["val/loss"]
    for events in tmp_path.glob("events.*"):  # one of the training, one of the test
        events.unlink()
    assert read_curves(tmp_path)["val/loss"].value == pytest.approx(curves.value)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            "+callbacks.mine={_target_: outside.Missing}",
            r"callbacks\.mine\._target_=outside\.Missing cannot be made",
        ),
        (
            "+callbacks.mine={_target_: datetime.date, year: 1, month: 1, day: 1}",
            r"datetime\.date is no pytorch",
        ),
        (
            "+logger.mine={_target_: sglight.loggers.TableLogger, folder: x}",
            r"logger\.mine\._target_.* 'folder'",
        ),
    ],
)
def test_what_is_no_callback_or_logger_is_refused(start, tmp_path, given, sentence):
    with pytest.raises(UserError, match=sentence):
        start(tmp_path, given)


def test_what_wandb_refuses_is_one_sentence():
    refusal = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})
    with (
        pytest.raises(
            UserError, match=r"^logger=wandb: No key\. Log in; or add logger\.wandb\.offline=true$"
        ),
        beginning(),
    ):
        raise refusal("No key. Log in.\nMore.")
    with pytest.raises(ValueError, match="ours"), beginning():
        raise ValueError("ours")


def test_wandb_logs_without_a_network(start, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    start(tmp_path, "logger=wandb", "logger.wandb.offline=true")
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert wandb.run is None, "the next run of a sweep would go on with it"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_validations_within_an_epoch_change_nothing_else(start, tmp_path, strategy):
    options = (f"strategy={strategy}", "dataset.batch_size=16", "logger=none")
    for name, interval in (("a", "null"), ("b", "0.5")):
        start(tmp_path / name, *options, f"trainer.val_check_interval={interval}")
    a, b = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in "ab"
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_best_of_validations_within_an_epoch_is_kept(start, tmp_path):
    start(tmp_path, "strategy=backprop", "dataset.batch_size=16", "trainer.val_check_interval=2")
    values = read_curves(tmp_path)["val/acc"]
    assert len(values.value) == 6, "three in each of two epochs of six batches"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["val/acc"] == pytest.approx(max(values.value))


@pytest.mark.parametrize("strategy", ["backprop", "delayed"])
def test_a_number_of_steps_ends_a_training_which_goes_on_as_if_it_had_not(start, tmp_path, strategy):
    options = (f"strategy={strategy}", "dataset.batch_size=16", "logger=none")
    start(tmp_path / "whole", *options)
    start(tmp_path / "part", *options, "trainer.max_steps=8")
    assert json.loads((tmp_path / "part/metrics.json").read_text())["run/steps"] == 8
    start(tmp_path / "rest", *options, f"ckpt={tmp_path / 'part'}", "trainer.max_steps=null")
    whole, rest = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "rest")
    )
    assert all(torch.equal(whole[key], rest[key]) for key in whole)


def test_overfitting_sees_the_same_batches_in_every_epoch(compose_config):
    datamodule = experiment.build_datamodule(to_plain(compose_config(*SMALL, "dataset.batch_size=16")))
    datamodule.trainer = pl.Trainer(overfit_batches=2, logger=False, accelerator="cpu")
    loader = datamodule.train_dataloader()
    first, second = ([labels.tolist() for _, labels in loader][:2] for _ in range(2))
    assert first == second


def test_a_misplaced_interval_is_refused(start, tmp_path):
    with pytest.raises(UserError, match=r"trainer\.val_check_interval=9 is more than the 2 batches"):
        start(tmp_path, "trainer.val_check_interval=9")


@pytest.mark.parametrize("key", ["limit_val_batches", "limit_test_batches", "overfit_batches"])
def test_a_part_of_the_batches_that_is_none_is_refused_before_the_training(
    start: Callable[..., float], tmp_path: Path, key: str
) -> None:
    with pytest.raises(UserError, match=rf"{key}=0\.5 is no whole batch of the 1 that there are"):
        start(tmp_path, f"trainer.{key}=0.5")
    assert not (tmp_path / "checkpoints").exists()
