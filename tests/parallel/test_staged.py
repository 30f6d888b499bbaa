"""What callbacks know on every worker, and that workers which see different batches stop."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from sglight.errors import UserError
from sglight.parallel.launcher import current, launch
from sglight.parallel.strategy import StageStrategy
from sglight.parallel.wiring import meet
from sglight.strategies.dni import DNI
from tests.strategies.common import ADAM, NETWORK, batches

pytestmark = pytest.mark.timeout(300)

COSINE = {"name": "cosine", "min_factor": 0.1}
RATES = {"lr/stage_0", "lr/stage_1", "lr/estimator_0"}


class Draw(Callback):
    """Draws on one worker only, as dropout in an estimator would."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_rank == 1:
            torch.rand(1)


class Fewer:
    """Batches of which one worker has fewer."""

    def __init__(self) -> None:
        self.data = batches(4)

    def __len__(self) -> int:
        worker = current()
        return len(self.data) - (0 if worker is None else worker.rank)

    def __iter__(self) -> Any:
        return iter(self.data[: len(self)])


def fit(folder: Path, workers: int, data: Any, callbacks: list[Callback], epochs: int = 3) -> pl.Trainer:
    parallel: dict[str, Any] = {"strategy": StageStrategy(), "devices": workers} if workers > 1 else {}
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=CSVLogger(folder, "", ""), enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=2, num_sanity_val_steps=0,
        callbacks=callbacks, **parallel,
    )  # fmt: skip
    trainer.fit(DNI(NETWORK, ADAM, stages=2, scheduler=COSINE), data)
    return trainer


def rates(folder: Path, workers: int, interval: str) -> dict[str, float]:
    """What callbacks know of the rates in the end, by name."""
    monitor = LearningRateMonitor(interval)
    trainer = fit(folder, workers, DataLoader(batches(4), batch_size=None), [monitor], epochs=2)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("lr/")}


def curves(folder: Path) -> list[tuple[int, str, float]]:
    """The rates in a log."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return sorted(
        (int(row["step"]), name, float(row[name])) for row in rows for name in RATES if row.get(name)
    )


def stop(folder: Path, workers: int) -> tuple[int, float]:
    """Where a training ends that stops early on its own loss, which is known to the last worker."""
    stopping = EarlyStopping("train/loss", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    trainer = fit(folder, workers, DataLoader(batches(1), batch_size=None), [stopping], epochs=9)
    return trainer.current_epoch, float(trainer.callback_metrics["train/loss"])


def shuffled(folder: Path, workers: int, generator: torch.Generator | None) -> int:
    torch.manual_seed(3)
    x, labels = torch.randn(60, 3), torch.arange(60) % 4
    data = DataLoader(TensorDataset(x, labels), 10, shuffle=True, generator=generator)
    return fit(folder, workers, data, [Draw()]).global_step


def refused(function: Any, *args: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*args)
    return str(caught.value)


def job(folder: Path, workers: int) -> dict[str, Any]:
    """Each worker's findings."""
    torch.set_num_threads(1)
    own: dict[str, Any] = {
        **{interval: rates(folder / interval, workers, interval) for interval in ("epoch", "step")},
        "stop": stop(folder / "stop", workers),
        "own": shuffled(folder / "own", workers, torch.Generator().manual_seed(1)),
    }
    if workers > 1:
        own["shuffled"] = refused(shuffled, folder / "shuffled", workers, None)
        own["fewer"] = refused(fit, folder / "fewer", workers, Fewer(), [])
    return own


def job_on(folder: Path, workers: int) -> list[dict[str, Any]]:
    """`job`, and what it finds on all workers, at the first."""
    own, meeting = job(folder, workers), meet("compare")
    return [own] if meeting is None else meeting.peers().gather(own)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("staged")
    (alone,) = job_on(folder / "1", 1)
    return folder, alone, launch(job_on, folder / "2", 2, workers=2, threads=1)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_all_rates_are_known_to_all(found: Any, interval: str) -> None:
    folder, alone, workers = found
    assert alone[interval].keys() == RATES
    assert [worker[interval] for worker in workers] == [alone[interval]] * 2
    assert curves(folder / "2" / interval) == curves(folder / "1" / interval) != []


def test_the_training_loss_stops_all(found: Any) -> None:
    _, alone, workers = found
    assert alone["stop"][0] == 2
    assert [worker["stop"] for worker in workers] == [alone["stop"]] * 2


def test_a_generator_of_its_own_shuffles_alike(found: Any) -> None:
    _, alone, workers = found
    assert [worker["own"] for worker in workers] == [alone["own"]] * 2 == [18, 18]


def test_workers_that_see_different_batches_stop(found: Any) -> None:
    for worker in found[2]:
        assert "see different batches, by the labels of the first in epoch 1" in worker["shuffled"]
        assert "different numbers of batches in epoch 0, 4, 3" in worker["fewer"]
