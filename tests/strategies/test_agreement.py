"""A Trainer that would go wrong in silence is refused, and so are workers that see different batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import Tensor

from sglight.errors import UserError
from sglight.link import Alone
from sglight.parallel.strategy import StageStrategy
from sglight.strategies.agreement import check_batches, check_trainer, checksum
from sglight.strategies.backprop import Backprop
from tests.strategies.common import ADAM, NETWORK, batches, fit


class Two(Alone):
    """This worker, and another that says ``other``."""

    size = 2

    def __init__(self, other: Any) -> None:
        self.other = other

    def share(self, value: Any) -> list[Any]:
        return [value, self.other]


def seen_by(labels: Tensor, count: float = 5) -> Any:
    return count, list(labels.shape), checksum(labels)


def trainer_with(strategy: Any, scaler: Any = None) -> Any:
    return SimpleNamespace(
        strategy=strategy, precision="16-mixed", precision_plugin=SimpleNamespace(scaler=scaler)
    )


class Mine(StageStrategy):
    pass


@pytest.mark.parametrize(
    "strategy", [SingleDeviceStrategy(), StageStrategy(), Mine()], ids=lambda s: type(s).__name__
)
def test_one_device_and_stages_pass(strategy: Any) -> None:
    check_trainer(trainer_with(strategy))


@pytest.mark.parametrize("strategy", [DDPStrategy(), FSDPStrategy()], ids=lambda s: type(s).__name__)
def test_copies_that_would_drift_apart_are_refused(strategy: Any) -> None:
    with pytest.raises(UserError, match=rf"strategy={type(strategy).__name__}\).*drift apart.*StageStrategy"):
        check_trainer(trainer_with(strategy))


def test_a_scaled_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"16-mixed.*use bf16-mixed"):
        check_trainer(trainer_with(SingleDeviceStrategy(), scaler=object()))


def test_it_is_refused_before_anything_is_built() -> None:
    module = Backprop(NETWORK, ADAM)
    module.trainer = pl.Trainer(strategy="ddp", devices=1, accelerator="cpu", logger=False)
    with pytest.raises(UserError, match="strategy=DDPStrategy"):
        module.setup("fit")
    assert not module.stages
    fit(module, batches(1))  # it is none the worse


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bfloat16, torch.float64])
def test_a_checksum_is_of_the_values_in_their_order(dtype: torch.dtype) -> None:
    labels = torch.arange(6).to(dtype)
    assert checksum(labels) == checksum(labels.clone()) == checksum(torch.stack([labels, labels], 1)[:, 0])
    assert checksum(labels) != checksum(labels.flip(0))


def test_workers_must_see_the_same() -> None:
    labels = torch.tensor([0, 1, 2])
    check_batches(Two(seen_by(labels)), labels, 5, "epoch 3")
    with pytest.raises(UserError, match=r"different batches.*epoch 3.*generator="):
        check_batches(Two(seen_by(labels.flip(0))), labels, 5, "epoch 3")
    with pytest.raises(UserError, match=r"different batches"):
        check_batches(Two(seen_by(labels[:2])), labels, 5, "epoch 3")
    with pytest.raises(UserError, match=r"different numbers of batches in epoch 3, 5, 6"):
        check_batches(Two(seen_by(labels, 6)), labels, 5, "epoch 3")


def test_they_are_compared_once_an_epoch() -> None:
    asked = []

    class Counting(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pl_module._compare_batches = lambda batch, count, when: asked.append((count, when))

    fit(Backprop(NETWORK, ADAM), batches(3), epochs=2, callbacks=[Counting()])
    assert asked == [(3, "epoch 0"), (3, "epoch 1")]
