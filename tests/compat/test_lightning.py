"""The private parts of Lightning that sglight depends on are still there."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.trainer.connectors.logger_connector import result
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from sglight.compat import lightning as compat

BATCHES, EPOCHS = 3, 2


class Boring(pl.LightningModule):
    """Steps its optimiser by itself, and notes what the functions under test say."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: dict[str, list[Any]] = {"loader": [], "size": [], "processed": [], "handler": []}

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.seen["loader"].append(compat.batches_in_loader(self.trainer))
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen["processed"].append(compat.batches_processed(self.trainer))
        self.seen["handler"].append(signal.getsignal(signal.SIGTERM))
        compat.count_batches(self.trainer, self.trainer.current_epoch * BATCHES + batch_idx + 1)


class Data(pl.LightningDataModule):
    batch_size = 2

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.zeros(BATCHES * self.batch_size, 1)), self.batch_size)


@pytest.fixture
def fitted(tmp_path: Path) -> tuple[pl.Trainer, Boring]:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1),
    )  # fmt: skip
    compat.leave_signals(trainer)
    module = Boring()
    trainer.fit(module, Data())
    return trainer, module


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_training_tells_its_batches(fitted: tuple[pl.Trainer, Boring], tmp_path: Path) -> None:
    trainer, module = fitted
    assert module.seen["loader"] == [BATCHES]
    assert module.seen["processed"] == [0, 1, 2] * EPOCHS
    assert compat.batch_size(trainer) == 2
    assert trainer.global_step == BATCHES * EPOCHS
    assert set(module.seen["handler"]) == {signal.getsignal(signal.SIGTERM)}, "Lightning answers signals"
    checkpoints = [torch.load(tmp_path / f"step={k + 1}.ckpt", weights_only=True) for k in range(6)]
    assert [compat.epochs_done(checkpoint) for checkpoint in checkpoints] == [0, 0, 1, 1, 1, 2]


class Accuracy(torchmetrics.Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0))

    @override
    def update(self, value: Tensor) -> None:
        self.total += value

    @override
    def compute(self) -> Tensor:
        return self.total


def test_what_is_logged_is_moved_only_if_it_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def logged() -> tuple[result._ResultCollection, dict[str, Tensor]]:
        found = result._ResultCollection(training=True)
        accuracy = Accuracy()
        for value in (1.0, 2.5):
            found.log("fit", "mean", torch.tensor(value), on_step=True, batch_size=2)
            found.log("fit", "most", torch.tensor(value), reduce_fx=torch.max)
            accuracy(torch.tensor(value))
            found.log("fit", "metric", accuracy)  # type: ignore[arg-type]
        return found, found.metrics(on_step=False)["callback"]

    monkeypatch.setattr(result._ResultMetric, "to", result._ResultMetric.to)
    compat.log_quickly.cache_clear()
    _, expected = logged()
    compat.log_quickly()
    found, values = logged()
    assert values == expected == {"mean": 1.75, "mean_epoch": 1.75, "most": 2.5, "metric": 3.5}
    mean = found["fit.mean"]
    with monkeypatch.context() as context:
        context.setattr(result, "apply_to_collection", None)
        assert mean.to(torch.device("cpu")) is mean
    assert mean.to(torch.device("meta")).value.device.type == "meta"
    assert mean.cumulated_batch_size.device.type == "meta"
    compat.log_quickly.cache_clear()


def test_the_rank_is_the_one_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    compat.set_rank(3)
    assert rank_zero_only(lambda: "worker 0 only")() is None
    compat.set_rank(0)
    assert rank_zero_only(lambda: "worker 0 only")() == "worker 0 only"


def test_a_checkpoint_is_written_where_a_subclass_says_and_known_by_its_own_name(tmp_path: Path) -> None:
    class Elsewhere(compat.RedirectedCheckpoint):
        @override
        def write_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
            super().write_checkpoint(trainer, f"{filepath}.elsewhere")

    callback = Elsewhere(tmp_path, "last", save_on_train_epoch_end=True)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callback,
    )  # fmt: skip
    module = Boring()
    assert compat.trainer_of(module) is None
    trainer.fit(module, Data())
    assert compat.trainer_of(module) is trainer
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt.elsewhere"]
    assert callback.best_model_path == str(tmp_path / "last.ckpt")
    assert callback._last_checkpoint_saved == callback.best_model_path
    assert callback._last_global_step_saved == BATCHES
    callback.forget_step()
    assert callback._last_global_step_saved == 0
