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


def test_an_unknown_metric_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks\.checkpoint\.monitor=val/f1 .*val/acc"):
        fit(checkpoints(tmp_path, "val/f1"), tmp_path)
