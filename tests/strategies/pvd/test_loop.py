"""The loop that the module brings along: in front of the Trainer's callbacks, once, and for no other module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from sglight.errors import UserError
from sglight.strategies.backprop import Backprop
from sglight.strategies.pvd import PVD, PVDLoop
from sglight.strategies.pvd.objective import flat
from tests.strategies.common import ADAM, NETWORK, assert_equal, batches, fit

BATCHES, EPOCHS = 3, 2


class Counting(PVD):
    """Counts its iterations."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.began = self.ended = 0

    def begin_iteration(self) -> None:
        super().begin_iteration()
        self.began += 1

    def end_iteration(self) -> None:
        super().end_iteration()
        self.ended += 1


class OwnLoop(PVDLoop):
    """A loop of the user's."""


class Watch(Callback):
    """What a callback of the Trainer's sees: weights, and whether there is an iteration, by hook."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        self.iterating: list[bool] = []

    def look(self, hook: str, module: Any) -> None:
        self.seen.setdefault(hook, []).append(flat([p.detach() for p in module.parameters()]))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.iterating.append(pl_module.iterating)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.look("batch", pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.look("validation", pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.look("epoch", pl_module)


def trained(callbacks: list[Callback], **options: Any) -> tuple[Counting, pl.Trainer]:
    """A training with a validation behind each epoch."""
    module = Counting(NETWORK, ADAM, processors=2)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False,
        callbacks=callbacks, **{"enable_checkpointing": False, **options},
    )  # fmt: skip
    training, validation = (DataLoader(batches(BATCHES, seed=s), batch_size=None) for s in (0, 1))
    trainer.fit(module, training, validation)
    return module, trainer


def test_a_plain_trainer_is_enough(tmp_path: Path) -> None:
    module = Counting(NETWORK, ADAM)
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", default_root_dir=tmp_path)
    trainer.fit(module, DataLoader(batches(BATCHES), batch_size=None))
    assert (module.began, module.ended) == (EPOCHS, EPOCHS)
    assert_equal(module.state_dict(), trained([])[0].state_dict())


def test_callbacks_see_the_weights_of_the_synchronisation(tmp_path: Path) -> None:
    watch, saver = Watch(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=BATCHES, save_top_k=-1)
    stopper = EarlyStopping("val/loss", patience=100)
    module, trainer = trained([stopper, saver, watch], enable_checkpointing=True)
    assert isinstance(trainer.callbacks[0], PVDLoop)
    assert watch.iterating == [True] * BATCHES * EPOCHS
    *_, first, before, _, last = watch.seen["batch"]
    assert not torch.equal(first, last) and torch.equal(first, before)
    # The sanity check comes first.
    assert torch.equal(watch.seen["validation"][1], first) and torch.equal(watch.seen["validation"][2], last)
    assert torch.equal(watch.seen["epoch"][0], first) and torch.equal(watch.seen["epoch"][1], last)
    assert_equal(module.state_dict(), torch.load(saver.best_model_path, weights_only=True)["state_dict"])


def test_the_other_callbacks_keep_their_order() -> None:
    given: list[Callback] = [Watch(), OwnLoop(), EarlyStopping("val/loss"), Watch()]
    _, trainer = trained(given)
    assert trainer.callbacks[:4] == [given[1], given[0], given[2], given[3]]


@pytest.mark.parametrize("given", [[PVDLoop()], [PVDLoop(), PVDLoop()], [OwnLoop()], [Watch(), OwnLoop()]])
def test_a_loop_that_is_given_iterates_as_often(given: list[Callback]) -> None:
    module, trainer = trained(given)
    assert (module.began, module.ended) == (EPOCHS, EPOCHS)
    assert_equal(module.state_dict(), trained([])[0].state_dict())
    loops = [callback for callback in trainer.callbacks if isinstance(callback, PVDLoop)]
    assert loops and all(loop in given for loop in loops)


def test_a_second_training_by_the_same_trainer_has_one_loop() -> None:
    module, trainer = trained([])
    trainer.fit_loop.max_epochs = EPOCHS + 1
    trainer.fit(module, DataLoader(batches(BATCHES), batch_size=None))
    assert (module.began, module.ended) == (1, 1)
    assert sum(isinstance(callback, PVDLoop) for callback in trainer.callbacks) == 1


def test_a_trainer_that_keeps_the_loop_trains_other_strategies() -> None:
    _, trainer = trained([])
    trainer.fit_loop.max_epochs = EPOCHS + 1
    plain = Backprop(NETWORK, ADAM)
    trainer.fit(plain, DataLoader(batches(BATCHES), batch_size=None))
    assert any(isinstance(callback, PVDLoop) for callback in trainer.callbacks)
    expected = Backprop(NETWORK, ADAM)
    fit(expected, batches(BATCHES))
    assert_equal(plain.state_dict(), expected.state_dict())


def test_a_module_that_leaves_the_loop_out_is_told() -> None:
    class Forgetful(PVD):
        def configure_callbacks(self) -> list[Callback]:
            return [Watch()]

    with pytest.raises(UserError, match="configure_callbacks add to what super"):
        fit(Forgetful(NETWORK, ADAM), batches(2))
