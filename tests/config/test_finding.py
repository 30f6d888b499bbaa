"""Which checkpoint a command means, and what it gives to the command; the checkpoints here have no tensors."""

import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

import sglight.__main__ as command
from sglight.config.composing import check, to_plain


@pytest.fixture
def call(monkeypatch, tmp_path, capfd):
    """``call(*words)`` gives the config with which the command would run in `tmp_path`, or what it answers."""
    monkeypatch.chdir(tmp_path)

    def called(*words: str):
        seen: list = []
        monkeypatch.setattr(command.start, "run", lambda cfg: seen.append(to_plain(cfg)) or 0.5)
        monkeypatch.setattr(sys, "argv", ["sglight", *words])
        GlobalHydra.instance().clear()
        try:
            command.main()
        except SystemExit as end:
            return str(end.code)
        return seen[-1]

    return called


@pytest.fixture
def write(compose_config):
    """``write(path, age, *overrides)`` leaves the checkpoint of a run with these overrides."""

    def written(path: Path, age: float, *overrides: str) -> Path:
        config = to_plain(check(compose_config(*overrides)))
        choices = {word.partition("=")[0]: word.partition("=")[2] for word in overrides if "." not in word}
        choices = {key: choices[key] for key in ("dataset", "model", "strategy") if key in choices}
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("it/data.pkl", pickle.dumps({"run": {"config": config, "choices": choices}}))
        os.utime(path, (1e9 - age, 1e9 - age))
        return path

    return written


OTHER = (
    "dataset=ellipse",
    "model=resnet",
    "strategy=pvd",
    "seed=7",
    "model.steps=4",
    "trainer.precision=64-true",
)


def test_a_test_needs_no_other_key(call, write, tmp_path):
    path = write(tmp_path / "its.ckpt", 0, *OTHER, "trainer.max_epochs=3")
    cfg = call("mode=test", "ckpt=its.ckpt")
    assert (cfg["seed"], cfg["dataset"]["name"], cfg["model"]["steps"]) == (7, "ellipse", 4)
    assert (cfg["model"]["dynamics"], cfg["strategy"]["_target_"]) == ("euler", "sglight.strategies.pvd.PVD")
    assert (cfg["trainer"]["precision"], cfg["trainer"]["max_epochs"], cfg["ckpt"]) == (
        "64-true",
        20,
        str(path),
    )
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert folder.name.endswith("-ellipse-resnet-pvd-seed7")


def test_a_run_goes_on_as_it_was_but_for_what_is_given(call, write, tmp_path):
    write(tmp_path / "its.ckpt", 0, *OTHER, "trainer.max_epochs=3", "strategy.optimizer.lr=0.25")
    cfg = call("ckpt=its.ckpt", "trainer.max_epochs=9", "logger=csv")
    assert (cfg["seed"], cfg["strategy"]["optimizer"]["lr"]) == (7, 0.25)
    assert (cfg["trainer"]["max_epochs"], cfg["trainer"]["precision"], list(cfg["logger"])) == (
        9,
        "64-true",
        ["csv"],
    )
    assert call("ckpt=its.ckpt", "strategy.optimizer.lr=0.5")["strategy"]["optimizer"]["lr"] == 0.5


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("seed=2", "seed=7, not 2"),
        ("model.steps=8", "model.steps=4, not 8"),
        ("strategy=dni", "strategy=pvd, not dni"),
        ("dataset=digits", "dataset.name=ellipse, not digits"),
        ("experiment=digits", "was trained with"),
    ],
)
def test_what_may_not_be_given_is_refused_by_name(call, write, tmp_path, word, sentence):
    write(tmp_path / "its.ckpt", 0, *OTHER)
    answer = call("ckpt=its.ckpt", word)
    assert answer.startswith(f"error: ckpt={tmp_path}/its.ckpt was trained with ")
    assert sentence in answer


def test_last_is_the_newest_that_fits_and_is_whole(call, write, tmp_path, capfd):
    day = tmp_path / "outputs/2026-01-01"
    name = "digits-hamiltonian-delayed-seed1/checkpoints/last.ckpt"
    four = write(day / f"01-{name}", 30, "strategy.stages=4", "trainer.max_epochs=5")
    two = write(day / f"02-{name}", 20, "strategy.stages=2")
    broken = write(day / f"03-{name}", 10)
    broken.write_bytes(broken.read_bytes()[:-40])
    assert call("ckpt=last")["ckpt"] == str(two)
    assert f"ckpt=last passes over {broken}, which is damaged" in capfd.readouterr().err
    cfg = call("ckpt=last", "strategy.stages=4", "trainer.max_epochs=8")
    assert (cfg["ckpt"], cfg["trainer"]["max_epochs"]) == (str(four), 8)
    assert "none of the 3 that there are fits the keys given; give the path" in call("ckpt=last", "seed=2")


def test_last_is_also_found_in_a_folder_of_another_name(call, write, tmp_path):
    choices = ("dataset=ellipse", "model=hamiltonian", "strategy=dni")
    mine = write(tmp_path / "outputs/mine/checkpoints/last.ckpt", 20, *choices, "trainer.max_epochs=3")
    write(tmp_path / "outputs/other/checkpoints/last.ckpt", 10, *choices[:2], "strategy=pvd")
    (tmp_path / "outputs/empty/checkpoints").mkdir(parents=True)
    (tmp_path / "outputs/empty/checkpoints/last.ckpt").touch()
    cfg = call("ckpt=last", *choices)
    assert (cfg["ckpt"], cfg["trainer"]["max_epochs"]) == (str(mine), 3)


@pytest.mark.parametrize("mode", ["fit", "test"])
def test_a_section_on_the_command_line_does_not_give_what_it_takes_from_other_keys(
    call, write, tmp_path, mode
):
    """`dataset.seed` is ``${seed}``, and the kind of estimators follows `model.kernel`; neither is given here."""
    choices = ("dataset=ellipse", "model=hamiltonian", "strategy=dni", "seed=7")
    last = write(tmp_path / "outputs/today/mine/checkpoints/last.ckpt", 0, *choices)
    for words in (("dataset=ellipse",), ("dataset=ellipse", "model=hamiltonian"), ("seed=7",)):
        cfg = call(f"mode={mode}", "ckpt=last", "dataset=ellipse", "strategy=dni", *words)
        assert (cfg["ckpt"], cfg["seed"], cfg["dataset"]["seed"]) == (str(last), 7, 7)
        assert call(f"mode={mode}", f"ckpt={last}", *words)["dataset"]["seed"] == 7
    assert "dataset.seed=7, not 3" in call(f"mode={mode}", f"ckpt={last}", "dataset.seed=3")
    assert "was trained with" in call(f"mode={mode}", f"ckpt={last}", "dataset=ellipse", "seed=3")


def test_estimators_of_a_strategy_on_the_command_line_follow_the_model_of_the_checkpoint(
    call, write, tmp_path
):
    choices = ("dataset=digits", "model=hamiltonian", "strategy=dni", "model.kernel=conv")
    last = write(tmp_path / "outputs/today/mine/checkpoints/last.ckpt", 0, *choices)
    cfg = call("ckpt=last", "strategy=dni")
    assert (cfg["ckpt"], cfg["strategy"]["estimator"]["name"]) == (str(last), "conv")


def test_a_preset_goes_on_with_the_seed_of_the_checkpoint(call, write, tmp_path):
    last = write(tmp_path / "last.ckpt", 0, "experiment=ellipse", "seed=7")
    cfg = call(f"ckpt={last}", "experiment=ellipse")
    assert (cfg["seed"], cfg["dataset"]["seed"]) == (7, 7)
    assert "seed=7, not 2" in call(f"ckpt={last}", "experiment=ellipse", "seed=2")
