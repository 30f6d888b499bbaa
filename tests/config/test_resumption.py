"""What may change when a run goes on, what the run is then called, and what is taken from the checkpoint."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from sglight.config.completed import config_hash
from sglight.config.composing import check, to_plain
from sglight.config.resumption import check_same, inherited, run_hash
from sglight.errors import UserError


@pytest.fixture
def plain(compose_config) -> Any:
    return lambda *overrides: to_plain(check(compose_config(*overrides)))


def record(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"config": config, "hash": config_hash(config), **changes}


REFUSED = {
    "seed=2": r"seed=1, not 2",
    "model.channels=32": r"model\.channels=64, not 32",
    "model.init_scale=2": r"model\.init_scale=1\.0, not 2\.0",
    "strategy.stages=4": r"strategy\.stages=2, not 4",
    "strategy.slack=1": r"strategy\.slack=0, not 1",
    "strategy.optimizer.name=sgd": r"optimizer\.name=adam, not sgd",
    "strategy=backprop": r"strategy=delayed, not backprop",
    "dataset.batch_size=9": r"dataset\.batch_size=64, not 9",
    "dataset=ellipse": r"dataset\.name=digits, not ellipse",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_a_training_is_may_not_change(plain, change: str) -> None:
    with pytest.raises(UserError, match=f"it was trained with .*{REFUSED[change]}; leave"):
        check_same(plain(), plain(change), "it")


ALLOWED = (
    "trainer.max_epochs=30", "trainer.devices=2", "callbacks.early_stopping.enabled=true", "logger=csv",
    "strategy.optimizer.lr=0.5", "strategy.clip_norm=1", "data_dir=there",
)  # fmt: skip


@pytest.mark.parametrize("change", ALLOWED)
def test_how_it_goes_on_may_change(plain, change: str) -> None:
    check_same(plain(), plain(change), "it")


def test_a_test_minds_neither_strategy_nor_batches(plain) -> None:
    test = plain("strategy=backprop", "dataset.batch_size=9") | {"mode": "test"}
    check_same(plain(), test, "it")
    with pytest.raises(UserError, match="seed=1, not 2"):
        check_same(plain(), test | {"seed": 2}, "it")


def test_the_choice_of_a_group_is_named_as_it_was_given(plain) -> None:
    with pytest.raises(
        UserError, match=r"model\.dynamics=\w+, not leapfrog; leave model= or model\.dynamics= out"
    ):
        check_same(plain(), plain("model=leapfrog"), "it")


def test_a_run_that_went_on_unchanged_has_the_name_of_an_uninterrupted_one(plain) -> None:
    before, now = plain("trainer.max_epochs=5", "trainer.max_time=00:00:01:00"), plain()
    assert run_hash(now, {}) == run_hash(now, record(before)) == config_hash(now)


@pytest.mark.parametrize("change", ["strategy.optimizer.lr=0.5", "trainer.limit_train_batches=2"])
def test_a_run_that_went_on_otherwise_has_a_name_of_its_own(plain, change: str) -> None:
    before = record(plain(change))
    other = run_hash(plain(), before)
    assert other != config_hash(plain()) and other != before["hash"]
    assert run_hash(plain(), record(plain(), hash=other)) not in (other, config_hash(plain())), "and keeps it"


def test_where_the_length_matters_it_is_in_the_name(plain) -> None:
    cosine = "strategy.scheduler.name=cosine"
    assert run_hash(plain(cosine), record(plain(cosine, "trainer.max_epochs=5"))) != config_hash(
        plain(cosine)
    )


def test_batches_and_parts_of_them_are_two_things(plain) -> None:
    assert config_hash(plain("trainer.limit_train_batches=1")) != config_hash(
        plain("trainer.limit_train_batches=1.0")
    )


def test_what_the_command_line_leaves_out_is_the_checkpoints(plain) -> None:
    saved = plain("dataset=ellipse", "model=resnet", "strategy=pvd", "seed=7", "trainer.max_epochs=3")
    now = plain("trainer.max_epochs=9") | {"ckpt": "it", "data_dir": "here"}
    mixed, _ = inherited(saved, deepcopy(now), ["trainer.max_epochs=9", "ckpt=it"])
    assert mixed == saved | {
        "ckpt": "it", "data_dir": "here", "trainer": saved["trainer"] | {"max_epochs": 9}
    }  # fmt: skip
    tested, _ = inherited(saved, now | {"mode": "test"}, ["mode=test", "ckpt=it"])
    assert (tested["seed"], tested["model"], tested["strategy"]) == (7, saved["model"], saved["strategy"])
    assert tested["trainer"]["max_epochs"] == 9


def test_what_it_gives_wins(plain) -> None:
    saved, now = plain("seed=7"), plain("strategy.optimizer.lr=0.5", "model.steps=4")
    mixed, _ = inherited(saved, now, ["strategy.optimizer.lr=0.5", "model.steps=4"])
    assert mixed["strategy"]["optimizer"] == now["strategy"]["optimizer"]
    assert (mixed["model"]["steps"], mixed["seed"]) == (4, 7)
    assert inherited(saved, now, ["experiment=digits"])[0] == {**now, "seed": 7}
    assert inherited(saved, now, ["experiment=digits", "seed=1"])[0] == now
