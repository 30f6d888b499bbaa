"""Learning-rate schedules against their definitions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from sglight.config.schema import OptimizerConfig, SchedulerConfig
from sglight.strategies.backprop import Backprop
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.optim import Length, make_optimizer, make_scheduler
from sglight.strategies.pvd import PVD
from tests.strategies.common import NETWORK, batches

BATCHES = 7
SETTINGS = {"warmup_epochs": 0, "step_epochs": 2, "gamma": 0.1, "patience": 1, "min_factor": 0.1}


def rates(name: str, epochs: int = 6, batches: int = 5, **settings: Any) -> list[float]:
    """The rate in each batch of a run with base rate 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler: Any = make_scheduler(
        {"name": name, **SETTINGS, **settings}, optimizer, Length(epochs, batches)
    )
    found = []
    for _ in range(epochs * batches):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"name": "torch.optim.RMSprop", "kwargs": {"alfa": 1}},
            r"optimizer\.kwargs\.alfa is unknown .* alpha",
        ),
        ({"name": "torch.optim.LBFGS"}, r"LBFGS evaluates the loss several times a step"),
        ({"name": "torch.nn.Linear"}, r"name=torch\.nn\.Linear is no subclass of torch\.optim"),
        ({"name": "adamx"}, r"optimizer\.name=adamx is not allowed; did you mean adam"),
        ({"name": "adam", "kwargs": {"amsgrad": True}}, r"kwargs is for package\.module\.Class"),
        ({"learning_rate": 1}, r"optimizer\.learning_rate is unknown"),
    ],
)
def test_optimizers_that_there_are_not_are_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_optimizer(given, [weight()])


def test_an_optimizer_from_outside_is_the_same_as_by_hand() -> None:
    ours, theirs = weight(), weight()
    config = {"name": "torch.optim.RMSprop", "lr": 0.1, "weight_decay": 0.5, "kwargs": {"alpha": 0.7}}
    made = make_optimizer(config, [ours])
    by_hand = torch.optim.RMSprop([theirs], lr=0.1, weight_decay=0.5, alpha=0.7)
    for optimizer, parameter in ((made, ours), (by_hand, theirs)):
        parameter.grad = torch.tensor([1.0, 2.0])
        optimizer.step()
    assert torch.equal(ours, theirs)


def test_a_schedule_from_outside_is_made_with_its_arguments() -> None:
    config = {"name": "torch.optim.lr_scheduler.StepLR", "kwargs": {"step_size": 3, "gamma": 0.5}}
    optimizer = torch.optim.SGD([weight()], lr=1.0)
    scheduler = make_scheduler(config, optimizer, Length(1, 6))
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == [1, 1, 1, 0.5, 0.5, 0.5]


def test_none_keeps_the_rate() -> None:
    assert set(rates("none")) == {1.0}


def test_cosine_falls_from_one_to_its_floor() -> None:
    found = rates("cosine")
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t / 30)) for t in range(30)]
    assert found == pytest.approx(expected)


def test_step_and_exponential_change_between_epochs() -> None:
    assert rates("step")[::5] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert rates("exponential", gamma=0.5)[::5] == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625, 0.03125])
    assert len(set(rates("exponential")[:5])) == 1


def test_warmup_rises_to_the_full_rate_once() -> None:
    found = rates("cosine", warmup_epochs=2)
    assert found[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert max(found) == found[9] == found[10] == 1.0
    assert rates("none", warmup_epochs=1)[4:] == [1.0] * 26


def test_plateau_waits_for_its_patience() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler: Any = make_scheduler({"name": "plateau", **SETTINGS}, optimizer, Length(5, 5))
    for accuracy in (0.5, 0.5, 0.5):
        scheduler.step(accuracy)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    for _ in range(10):
        scheduler.step(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)  # min_factor


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_cut_tensor_is_updated_like_the_whole(name: str) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(1003), torch.randn(5, 1003)

    def train(a: int, b: int) -> torch.Tensor:
        parameter = nn.Parameter(start[a:b].clone())
        optimizer = make_optimizer({"name": name, "lr": 0.01, "weight_decay": 0.1}, [parameter])
        for gradient in gradients:
            parameter.grad = gradient[a:b].clone()
            optimizer.step()
        return parameter.detach()

    assert torch.equal(torch.cat([train(0, 3), train(3, 500), train(500, 1003)]), train(0, 1003))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"strategy\.optimizer\.name=rmsprop .*one of adam, adamw, nadam, sgd"
    ):
        make_optimizer({"name": "rmsprop", "lr": 1}, [nn.Parameter(torch.zeros(1))])
    with pytest.raises(
        ValueError, match=r"strategy\.scheduler\.name=cosin is not allowed; did you mean cosine\?"
    ):
        rates("cosin")


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"optimizer": {"rate": 1.0}}, r"strategy\.optimizer\.rate is unknown; choose one of name, lr, weight_decay"),
        ({"scheduler": {"name": "step", "gama": 0.5}}, r"strategy\.scheduler\.gama .*did you mean gamma\?"),
        ({"estimator": {"optimizer": {"lrs": 1}}}, r"strategy\.estimator\.optimizer\.lrs .*did you mean lr\?"),
    ],
)  # fmt: skip
def test_unknown_keys_are_refused_before_anything_is_trained(section: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        DNI(**{"network": NETWORK, "optimizer": {}, **section})


class Loader:
    """Fixed batches; one that goes on from a checkpoint leaves out those of the epoch that are over."""

    def __init__(self, count: int = BATCHES) -> None:
        self._batches, self._first = batches(count), 0
        self.trainer: pl.Trainer | None = None

    def __iter__(self) -> Iterator[Any]:
        first, self._first = self._first, 0
        yield from self._batches[first:]

    def state_dict(self) -> dict[str, int]:
        assert self.trainer is not None
        return {"batch": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._first = state["batch"] % len(self._batches)


class Sized(Loader):
    """It knows how many batches an epoch has."""

    def __len__(self) -> int:
        return len(self._batches)


class Stream(IterableDataset[Any]):
    """Batches that nobody has counted."""

    def __iter__(self) -> Iterator[Any]:
        yield from batches(BATCHES)


class Rates(pl.Callback):
    """The rate in each batch, as a part of the base rate: the same for all optimisers."""

    def __init__(self) -> None:
        self.found: list[float] = []

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        rates = [o.param_groups[0]["lr"] / o.defaults["lr"] for o in trainer.optimizers]
        assert rates == pytest.approx([rates[0]] * len(rates))
        self.found.append(rates[0])


def train(
    module: pl.LightningModule, loader: Any, *callbacks: pl.Callback, ckpt: Any = None, **options: Any
) -> list[float]:
    """The rates of a training."""
    rates = Rates()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[rates, *callbacks], **{"enable_checkpointing": bool(callbacks), **options},
    )  # fmt: skip
    loader.trainer = trainer
    trainer.fit(module, loader, ckpt_path=ckpt, weights_only=bool(ckpt))
    return rates.found


def network(name: str, **settings: Any) -> Backprop:
    """A network, of which only the rates matter here."""
    return Backprop(NETWORK, {"name": "adam", "lr": 0.01}, scheduler={"name": name, **settings})


def cosine(parts: Iterable[float], low: float = 0.0) -> Any:
    """The factors where those parts of the way are done."""
    return pytest.approx([low + (1 - low) * (1 + math.cos(math.pi * part)) / 2 for part in parts])


@pytest.mark.parametrize("epochs", [None, -1, 9])
def test_a_cosine_ends_with_the_last_of_so_many_steps(epochs: int | None) -> None:
    found = train(network("cosine", min_factor=0.1), Sized(), max_steps=30, max_epochs=epochs)
    assert found == cosine((t / 30 for t in range(30)), 0.1)  # in four epochs of 7, and a part of one


def test_a_cosine_ends_with_the_epochs_if_these_come_first() -> None:
    found = train(network("cosine"), Sized(), max_steps=30, max_epochs=2)
    assert found == cosine(t / 14 for t in range(14))


def test_a_cosine_by_steps_begins_behind_the_warm_up() -> None:
    found = train(network("cosine", warmup_epochs=2), Sized(), max_steps=30)
    assert found[:14] == pytest.approx([(t + 1) / 14 for t in range(14)])
    assert found[14:] == cosine(t / 16 for t in range(16))


@pytest.mark.parametrize(("limit", "count"), [(4, 4), (0.5, 3), (1.0, 7), (99, 7)])
def test_a_limit_of_batches_shortens_the_epochs(limit: float, count: int) -> None:
    found = train(network("cosine"), Sized(), max_epochs=3, limit_train_batches=limit)
    assert found == cosine(t / (3 * count) for t in range(3 * count))


def test_a_limit_gives_a_stream_a_length() -> None:
    found = train(network("cosine"), DataLoader(Stream(), None), max_epochs=3, limit_train_batches=4)
    assert found == cosine(t / 12 for t in range(12))


def by_epoch(*rates: float) -> Any:
    """One rate for all batches of an epoch."""
    return pytest.approx([rate for rate in rates for _ in range(BATCHES)])


@pytest.mark.parametrize(
    ("name", "settings", "factors"),
    [
        ("cosine", {"min_factor": 0.2}, [1.0, 0.8, 0.4]),  # 0.2 + 0.8 (1 + cos(pi e / 3)) / 2
        ("step", {"step_epochs": 2, "gamma": 0.1}, [1.0, 1.0, 0.1]),
        ("exponential", {"gamma": 0.5}, [1.0, 0.5, 0.25]),
        ("none", {"warmup_epochs": 2}, [0.5, 1.0, 1.0]),
        ("cosine", {"warmup_epochs": 1}, [1.0, 1.0, 0.5]),
        ("none", {}, [1.0, 1.0, 1.0]),
    ],
)
def test_a_stream_changes_its_rate_between_epochs(name: str, settings: Any, factors: list[float]) -> None:
    loader = DataLoader(Stream(), None)
    assert train(network(name, **settings), loader, max_epochs=3) == by_epoch(*factors)


def test_all_stages_and_estimators_of_a_stream_have_the_same_rate() -> None:
    module = DNI(NETWORK, {}, stages=2, scheduler={"name": "step", "step_epochs": 1})
    assert train(module, DataLoader(Stream(), None), max_epochs=2) == by_epoch(1.0, 0.1)


def test_late_updates_belong_to_the_epoch_of_their_batches() -> None:
    found: dict[Any, list[float]] = {}

    class Watched(Delayed):
        @override
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            found.setdefault(optimizer, []).append(optimizer.param_groups[0]["lr"])

    module = Watched(
        NETWORK, {"lr": 0.01}, stages=3, microbatches=1, scheduler={"name": "step", "step_epochs": 1}
    )
    train(module, DataLoader(Stream(), None), max_epochs=2)
    assert list(found.values()) == [by_epoch(0.01, 0.001)] * 3


def test_a_cosine_by_steps_falls_with_each_batch_of_a_stream() -> None:
    found = train(network("cosine"), DataLoader(Stream(), None), max_steps=30)
    assert found == cosine(t / 30 for t in range(30))


def test_behind_a_warm_up_in_epochs_too() -> None:
    found = train(network("cosine", warmup_epochs=2), DataLoader(Stream(), None), max_steps=30)
    assert found[:14] == by_epoch(0.5, 1.0)
    assert found[14:] == cosine(t / 16 for t in range(16))


def test_of_steps_and_epochs_of_a_stream_the_first_to_end_counts() -> None:
    found = train(network("cosine"), DataLoader(Stream(), None), max_steps=16, max_epochs=4)
    assert found == cosine(t / 16 for t in range(16))
    found = train(network("cosine"), DataLoader(Stream(), None), max_steps=1000, max_epochs=2)
    assert found[BATCHES:] == cosine([0.5] * BATCHES)


@pytest.mark.parametrize("loader", [Sized, Loader])
@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_time": "00:00:01:00"}])
def test_a_cosine_without_an_end_is_refused(loader: type[Loader], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"strategy\.scheduler\.name=cosine .*max_epochs or max_steps"):
        train(network("cosine"), loader(), **options)


def test_other_schedules_need_no_end() -> None:
    stop = pl.callbacks.LambdaCallback(
        on_train_epoch_end=lambda trainer, _: setattr(trainer, "should_stop", trainer.current_epoch == 2)
    )
    options = {"max_epochs": -1, "enable_checkpointing": False}
    found = train(network("exponential", gamma=0.5, warmup_epochs=1), Loader(), stop, **options)
    assert found == by_epoch(1.0, 0.5, 0.25)


@pytest.mark.parametrize("loader", [Sized, Loader])
@pytest.mark.parametrize("options", [{"max_steps": 20}, {"max_epochs": 3}])
@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "cosine", "warmup_epochs": 1},
        {"name": "step", "step_epochs": 1, "gamma": 0.5},
        {"name": "none", "warmup_epochs": 2},
    ],
    ids=lambda schedule: schedule["name"],
)
@pytest.mark.parametrize("stop", [4, 14])
def test_a_training_goes_on_in_mid_epoch_with_the_same_rates(
    loader: type[Loader], options: dict[str, Any], schedule: dict[str, Any], stop: int, tmp_path: Path
) -> None:
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    straight = train(network(**schedule), loader(), saved, **options)
    ckpt = tmp_path / f"step={stop}.ckpt"
    assert train(network(**schedule), loader(), ckpt=ckpt, **options) == straight[stop:]
    assert len(straight) == options.get("max_steps", 3 * BATCHES)


@pytest.mark.parametrize("name", ["none", "cosine", "step", "exponential", "plateau"])
def test_what_a_script_leaves_out_has_the_schemas_default(name: str) -> None:
    module = Backprop(NETWORK, {}, scheduler={"name": name})
    assert module.plan.optimizer == vars(OptimizerConfig())
    assert module.plan.scheduler == {**vars(SchedulerConfig()), "name": name}
    train(module, Sized(), max_epochs=1)
    assert module.trainer.optimizers[0].defaults["lr"] == OptimizerConfig.lr
    # Checkpoints hold no types of ours.
    assert {type(module.plan.optimizer["name"]), type(module.plan.scheduler["name"])} == {str}


def test_the_same_for_estimators_and_processors() -> None:
    module = DNI(NETWORK, {"lr": 0.5}, stages=2, estimator={"optimizer": {"lr": 0.25}})
    assert module.training_identity()["strategy.estimator.optimizer.name"] == "adam"
    train(module, Sized(), max_epochs=1)
    assert [optimizer.defaults["lr"] for optimizer in module.trainer.optimizers] == [0.5, 0.5, 0.25]
    assert PVD(NETWORK, {"lr": 0.5}, processors=2).directions.kind == "rms"


def test_defaults_of_sgd_and_step_are_at_work() -> None:
    optimizer: Any = make_optimizer({"name": "sgd"}, [nn.Parameter(torch.zeros(1))])
    assert optimizer.defaults["momentum"] == 0.9
    scheduler: Any = make_scheduler({"name": "step"}, optimizer, Length(None, 1))
    for _ in range(10):
        assert optimizer.param_groups[0]["lr"] == 1e-3
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)


def test_nadams_momentum_grows_with_the_delay() -> None:
    config = {"name": "nadam", "lr": 0.01, "betas": [0.9, 0.999], "delay_momentum": 0.99}
    found = []
    for lateness in (0.0, 0.5, 1.0):
        optimizer = make_optimizer(config, [nn.Parameter(torch.zeros(1))], lateness=lateness)
        found.append(optimizer.param_groups[0]["betas"])
    assert found == [(0.9, 0.999), (pytest.approx(0.945), 0.999), (pytest.approx(0.99), 0.999)]


def test_nesterov_needs_momentum() -> None:
    parameter = [nn.Parameter(torch.zeros(1))]
    assert make_optimizer({"name": "sgd", "nesterov": True}, parameter).param_groups[0]["nesterov"]
    with pytest.raises(ValueError, match=r"strategy\.optimizer\.nesterov=true needs"):
        make_optimizer({"name": "sgd", "nesterov": True, "momentum": 0.0}, parameter)
