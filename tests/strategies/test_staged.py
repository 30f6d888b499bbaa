"""What Lightning and scripts ask of a module in stages, whatever its strategy."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from torch.utils.data import DataLoader

from sglight.errors import UserError
from sglight.networks import StableNet
from sglight.strategies.backprop import Backprop
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.local import Local
from sglight.strategies.multilevel import Multilevel
from sglight.strategies.pvd import PVD
from sglight.strategies.simulation import StageTimes
from sglight.strategies.staged import StagedModule
from tests.strategies.common import ADAM, NETWORK, assert_equal, batches, fit

KINDS: dict[str, Any] = {
    "backprop": Backprop,
    "dni": lambda *a, **o: DNI(*a, stages=3, lag=2, diagnose_every_n_batches=2, **o),
    "delayed": lambda *a, **o: Delayed(*a, stages=3, **o),
    "pvd": PVD,
}


class Fail(Callback):
    """Ends a training in the middle of a batch."""

    def __init__(self, module: StagedModule, stage: int) -> None:
        self.hook = None
        self.module, self.stage = module, stage

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self.hook = pl_module.stage(self.stage).register_forward_pre_hook(self.fail)

    def fail(self, *_: Any) -> None:
        self.hook.remove()
        raise RuntimeError("on purpose")


def restarted(module: StagedModule) -> dict[str, Any]:
    """What a training begins with besides its parameters."""
    return {**module.progress(), "window": {i: list(window) for i, window in module.runtime.window.items()}}


# Before a fit.


@pytest.mark.parametrize("name", [*KINDS, "multilevel"])
def test_it_computes_before_a_training(name: str) -> None:
    module = Multilevel(NETWORK, ADAM, levels=2) if name == "multilevel" else KINDS[name](NETWORK, ADAM)
    net = StableNet(**vars(module.spec)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(module.double()(x), net(x))


def test_it_is_built_in_its_mode() -> None:
    module = Backprop({**NETWORK, "normalisation": "batch"}, ADAM).eval()
    module(torch.randn(5, 3))
    assert not any(part.training for part in module.modules())


def test_a_call_changes_nothing_of_the_training_behind_it() -> None:
    plain, called = (DNI(NETWORK, ADAM, stages=3) for _ in range(2))
    called(torch.randn(5, 3))
    for module in (plain, called):
        fit(module, batches(4))
    assert_equal(called.state_dict(), plain.state_dict())


def test_part_of_a_network_says_so() -> None:
    module = DNI(NETWORK, ADAM, stages=3)
    module.place(type(module.placement)(range(1, 3), {}, {}, module.placement.peers, module.placement.peers))
    with pytest.raises(RuntimeError, match="of 3 stages only 1, 2 live in this process"):
        module(torch.randn(5, 3))


# A fit behind another.


@pytest.mark.parametrize("name", KINDS)
def test_a_second_fit_is_like_the_first(name: str) -> None:
    module, other = KINDS[name](NETWORK, ADAM), KINDS[name](NETWORK, ADAM)
    data = batches(5)
    fit(module, data, epochs=2, log_every_n_steps=1)
    other.configure_model()
    other.load_state_dict(module.state_dict())
    for trained in (module, other):
        trainer = fit(trained, batches(5, seed=1), epochs=2, log_every_n_steps=1)
        assert trainer.global_step == 10
    assert_equal(module.state_dict(), other.state_dict())
    assert restarted(module) == restarted(other)
    assert {s.batch for s in module.recorder.spans} == {s.batch for s in other.recorder.spans}


@pytest.mark.parametrize("name", KINDS)
def test_a_trainer_goes_on(name: str) -> None:
    module = KINDS[name](NETWORK, ADAM)
    trainer = fit(module, batches(5), epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, DataLoader(batches(5), batch_size=None))
    assert (trainer.current_epoch, trainer.global_step, module.runtime.batch) == (3, 15, 15)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", ["dni", "delayed"])
def test_a_failed_fit_leaves_nothing_behind(name: str, stage: int) -> None:
    module, other = KINDS[name](NETWORK, ADAM), KINDS[name](NETWORK, ADAM)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, batches(5), callbacks=[Fail(module, stage)], log_every_n_steps=1)
    other.configure_model()
    other.load_state_dict(module.state_dict())
    for trained in (module, other):
        fit(trained, batches(5), log_every_n_steps=1)
    assert_equal(module.state_dict(), other.state_dict())
    assert module.trainer.callback_metrics["train/loss"] == other.trainer.callback_metrics["train/loss"]


def test_a_failed_validation_leaves_nothing_behind() -> None:
    module, data = Backprop(NETWORK, ADAM), DataLoader(batches(3), batch_size=None)
    trainer = fit(module, batches(1))
    right = trainer.validate(module, data, verbose=False)
    module.evaluation.add(torch.tensor(100.0), torch.tensor(3))
    assert trainer.validate(module, data, verbose=False) == right


# What callbacks know.


class Losses(Callback):
    """Loss and accuracy of each training batch, before its update; what the epoch ends with."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float]] = []
        self.epochs: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        x, labels = batch
        with torch.no_grad():
            logits = pl_module(x)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        self.seen.append((float(loss), float((logits.argmax(1) == labels).double().mean())))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.seen.clear()


@pytest.mark.parametrize("every", [0, 1, 3, 50])
@pytest.mark.parametrize("name", ["backprop", "dni"])
def test_an_epochs_mean_is_known_at_its_end(name: str, every: int) -> None:
    losses = Losses()
    for epochs in (1, 2):
        trainer = fit(
            KINDS[name](NETWORK, ADAM), batches(4), epochs, callbacks=[losses], log_every_n_steps=every
        )
        for key, values in zip(("train/loss", "train/acc"), zip(*losses.seen, strict=True), strict=True):
            assert float(trainer.callback_metrics[key]) == pytest.approx(sum(values) / len(values), rel=1e-5)


@pytest.mark.parametrize("at_the_end", [True, False, None])
def test_early_stopping_on_the_training_loss(at_the_end: bool | None) -> None:
    stopping = EarlyStopping("train/loss", patience=2, min_delta=100.0, check_on_train_epoch_end=at_the_end)
    trainer = pl.Trainer(
        max_epochs=9, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[stopping], num_sanity_val_steps=0,
    )  # fmt: skip
    data = DataLoader(batches(3), batch_size=None)
    trainer.fit(Backprop(NETWORK, ADAM), data, data)
    assert trainer.current_epoch == 3  # the first is the best


def test_never_to_log_is_possible() -> None:
    module = DNI(NETWORK, ADAM, stages=2, diagnose_every_n_batches=1)
    trainer = fit(module, batches(3), log_every_n_steps=0)
    assert not any(key.startswith("estimator_") for key in trainer.callback_metrics)


# Checkpoints.


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Any) -> None:
    trainer = fit(DNI(NETWORK, ADAM, stages=2), batches(2))
    path = tmp_path / "dni.ckpt"
    trainer.save_checkpoint(path)
    for module, difference in (
        (DNI(NETWORK, ADAM, stages=3), r"strategy\.stages=2, not 3"),
        (PVD(NETWORK, ADAM), "strategy=dni, not pvd"),
        (Multilevel(NETWORK, ADAM), "strategy=dni, not multilevel"),
        (DNI(NETWORK, {"name": "sgd", "lr": 0.1}), r"optimizer\.name=adam, not sgd"),
    ):
        with pytest.raises(UserError, match=rf"ckpt_path=.*dni\.ckpt was trained with .*{difference}"):
            fit(module, batches(2), ckpt=str(path))
    # Another optimiser may evaluate.
    data = DataLoader(batches(2), batch_size=None)
    trainer.test(
        DNI(NETWORK, {"name": "sgd", "lr": 0.1}), data, ckpt_path=path, verbose=False, weights_only=True
    )
    saved = torch.load(path, weights_only=True)
    torch.save({key: value for key, value in saved.items() if key != "progress"}, path)
    with pytest.raises(UserError, match=r"is not a checkpoint of this version of sglight"):
        fit(DNI(NETWORK, ADAM, stages=2), batches(2), ckpt=str(path))


@pytest.mark.parametrize("form", ["direct", "residual"])
def test_a_checkpoint_from_before_there_were_forms_of_estimators_goes_on(tmp_path: Any, form: str) -> None:
    module, path = DNI(NETWORK, ADAM, estimator={"form": form}), tmp_path / "dni.ckpt"
    fit(module, batches(2)).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    del saved["sglight"]["strategy.estimator.form"]
    saved["sglight"] |= {"strategy.estimator.residual": True} if form == "residual" else {}
    torch.save(saved, path)
    resumed = DNI(NETWORK, ADAM, estimator={"form": form})
    fit(resumed, batches(2), epochs=1, ckpt=str(path))
    assert_equal(resumed.state_dict(), module.state_dict())
    with pytest.raises(UserError, match=rf"strategy\.estimator\.form={form}, not sobolev"):
        fit(DNI(NETWORK, ADAM, estimator={"form": "sobolev"}), batches(2), ckpt=str(path))


def test_heads_that_saw_one_field_are_refused(tmp_path: Any) -> None:
    network, path = {**NETWORK, "dynamics": "leapfrog"}, tmp_path / "local.ckpt"
    fit(Local(network, ADAM), batches(2)).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    name = "estimators.0.layers.2.weight"
    saved["state_dict"][name] = saved["state_dict"][name][:, :5]
    torch.save(saved, path)
    with pytest.raises(
        UserError, match=r"local\.ckpt has estimators\.0.* \[64, 5\] instead of \[64, 10\].*ckpt"
    ):
        fit(Local(network, ADAM), batches(2), ckpt=str(path))


def test_a_module_is_loaded_without_a_trainer(tmp_path: Any) -> None:
    trained = Multilevel(NETWORK, ADAM, levels=2)
    trainer = fit(trained, batches(2), epochs=2)
    path = tmp_path / "some.ckpt"
    trainer.save_checkpoint(path)
    loaded = Multilevel.load_from_checkpoint(
        path, network=NETWORK, optimizer=ADAM, levels=2, weights_only=True
    )
    assert_equal(loaded.state_dict(), trained.state_dict())
    x = torch.randn(5, 3)
    assert loaded.level == 1 and torch.equal(loaded(x), trained(x))


# Precision and times.


class Look(Callback):
    """Notes whether autocast keeps lower-precision copies of weights, which would outlive an update in mid-batch."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        assert torch.is_autocast_enabled("cpu")
        self.keeps = torch.is_autocast_cache_enabled()


def test_lightnings_bf16_keeps_no_copies_of_weights() -> None:
    look = Look()
    fit(Delayed(NETWORK, ADAM, stages=3), batches(3), precision="bf16-mixed", callbacks=[look])
    assert not look.keeps


def test_a_lesson_in_every_third_batch_costs_a_batch_a_third(monkeypatch: pytest.MonkeyPatch) -> None:
    module = DNI(NETWORK, ADAM, stages=2, estimator={"name": "linear", "every_n_batches": 3})
    monkeypatch.setattr(module.recorder, "typical", lambda i: StageTimes(1.0, 2.0, 4.0, 6.0))
    assert module.phase_times() == [StageTimes(1.0, 2.0, 4.0, 2.0)] * 2
