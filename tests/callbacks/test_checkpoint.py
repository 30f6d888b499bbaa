"""Best and last checkpoint: of one run, and of a run that goes on in another folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from sglight.callbacks.checkpoint import BestCheckpoint, LastCheckpoint
from sglight.errors import UserError
from tests.callbacks.common import fit


def checkpoints(
    folder: Path, monitor: str = "val/acc", mode: str = "max"
) -> list[BestCheckpoint | LastCheckpoint]:
    return [BestCheckpoint(folder, monitor, mode), LastCheckpoint(folder)]


def epoch(path: Path) -> int:
    found: int = torch.load(path, weights_only=True)["epoch"]
    return found


def test_both_are_written_and_nothing_else(tmp_path: Path) -> None:
    fit(checkpoints(tmp_path), tmp_path, epochs=3)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert epoch(tmp_path / "last.ckpt") == 2


class Counted(Callback):
    """Logs the number of the epoch: a metric that only rises."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("run/epoch", float(trainer.current_epoch))


@pytest.mark.parametrize(("mode", "expected"), [("min", 0), ("max", 2)])
def test_best_is_the_best_epoch(tmp_path: Path, mode: str, expected: int) -> None:
    fit([Counted(), *checkpoints(tmp_path, "run/epoch", mode)], tmp_path, epochs=3)
    assert epoch(tmp_path / "best.ckpt") == expected


def test_best_is_one_of_the_refined_network(tmp_path: Path) -> None:
    """By this metric the first epoch is the best, but it is of the coarse network."""
    fit([Counted(), *checkpoints(tmp_path, "run/epoch", "min")], tmp_path, epochs=4, levels=2)
    assert epoch(tmp_path / "best.ckpt") == 2
    # Also in runs that go on from there.
    for name, ckpt in (("from best", tmp_path / "best.ckpt"), ("from last", tmp_path / "last.ckpt")):
        folder = tmp_path / name
        fit([Counted(), *checkpoints(folder, "run/epoch", "min")], folder, epochs=6, ckpt=ckpt, levels=2)
        assert epoch(folder / "best.ckpt") == 2


def test_a_resumed_run_knows_the_best_of_all_epochs(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fit(checkpoints(first), first, epochs=4)
    score = torch.load(first / "best.ckpt", weights_only=True)["callbacks"]["BestCheckpoint"][
        "best_model_score"
    ]
    callbacks = checkpoints(second)
    fit(callbacks, second, epochs=5, ckpt=first / "last.ckpt")
    best = callbacks[0]
    assert isinstance(best, BestCheckpoint)
    assert best.best_model_score is not None
    assert best.best_model_score >= score
    assert Path(best.best_model_path) == second / "best.ckpt"
    assert (second / "best.ckpt").is_file()
    assert epoch(second / "last.ckpt") == 4


class Near(Callback):
    """Logs a metric that is largest in one epoch."""

    def __init__(self, peak: int) -> None:
        self.peak = peak

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("run/near", -abs(float(trainer.current_epoch) - self.peak))


def test_the_best_of_a_folder_that_moved_is_found(tmp_path: Path) -> None:
    fit([Near(1), *checkpoints(tmp_path / "first", "run/near")], tmp_path, epochs=3)
    (tmp_path / "first").rename(tmp_path / "moved")
    callbacks = checkpoints(tmp_path / "second", "run/near")
    fit([Near(1), *callbacks], tmp_path, epochs=4, ckpt=tmp_path / "moved" / "last.ckpt")
    assert epoch(tmp_path / "second" / "best.ckpt") == 1
    assert callbacks[0].best_model_score == 0  # type: ignore[union-attr]


def test_a_best_of_later_epochs_is_none_of_a_run_that_goes_back(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fit([Near(3), *checkpoints(first, "run/near")], tmp_path, epochs=2)
    (first / "last.ckpt").rename(first / "early.ckpt")
    fit([Near(3), *checkpoints(first, "run/near")], tmp_path, epochs=4, ckpt=first / "early.ckpt")
    fit([Near(9), *checkpoints(second, "run/near")], tmp_path, epochs=3, ckpt=first / "early.ckpt")
    assert epoch(second / "best.ckpt") == 2


def test_a_test_after_the_training_leaves_the_best_alone(tmp_path: Path) -> None:
    callbacks = checkpoints(tmp_path / "first", "run/near")
    trainer = fit([Near(1), *callbacks], tmp_path, epochs=2)
    trainer.test(trainer.lightning_module, trainer.datamodule, str(callbacks[0].path), verbose=False)  # type: ignore[attr-defined]
    assert callbacks[0].best_model_path == str(callbacks[0].path)  # type: ignore[union-attr]


def test_an_interrupted_write_leaves_the_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(checkpoints(tmp_path), tmp_path, epochs=1)
    before = (tmp_path / "last.ckpt").read_bytes()

    def torn(trainer: pl.Trainer, path: str, *_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", torn)
    with pytest.raises(OSError, match="full"):
        fit([LastCheckpoint(tmp_path)], tmp_path, epochs=2, ckpt=tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_the_last_epoch_is_always_written(tmp_path: Path) -> None:
    fit([LastCheckpoint(tmp_path, every_n_epochs=2)], tmp_path, epochs=3)
    assert epoch(tmp_path / "last.ckpt") == 2


def test_an_unknown_metric_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks\.checkpoint\.monitor=val/f1 .*val/acc"):
        fit(checkpoints(tmp_path, "val/f1"), tmp_path)


def test_another_training_has_its_own_best(tmp_path: Path) -> None:
    best = BestCheckpoint(tmp_path, "run/epoch", "min")
    first = fit([Counted(), best], tmp_path, epochs=1).lightning_module.state_dict()
    second = fit([Counted(), best], tmp_path, epochs=1, seed=8).lightning_module.state_dict()
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in second.items())
    assert not all(torch.equal(saved[name], value) for name, value in first.items())


def test_a_state_of_another_version_does_no_harm(tmp_path: Path) -> None:
    for state in ({}, {"best_model_score": torch.tensor(1.0), "monitor": "val/acc", "mode": "max"}):
        best = BestCheckpoint(tmp_path)
        best.load_state_dict(state)
        fit([best], tmp_path, epochs=1)
        assert (tmp_path / "best.ckpt").exists() and best.best_model_score <= 1
