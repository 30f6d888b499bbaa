"""Runs that are done are known by what they were asked for, not by how."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from sglight.config.completed import config_hash, find_completed
from sglight.config.composing import check, to_plain


@pytest.fixture
def plain(compose_config) -> dict[str, Any]:
    return to_plain(check(compose_config()))


def reversed_keys(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: reversed_keys(value) for key, value in reversed(node.items())}
    return node


def test_the_order_of_keys_and_the_kind_of_equal_numbers_do_not_matter(plain):
    assert list(plain) != list(reversed_keys(plain))
    assert config_hash(reversed_keys(plain)) == config_hash(plain)
    for horizon in (4, 4.0):
        plain["model"]["horizon"] = horizon
        assert config_hash(plain) == config_hash(plain | {"model": plain["model"] | {"horizon": 4.0}})
    assert config_hash(json.loads(json.dumps(plain))) == config_hash(plain)


SAME = [
    ["skip_completed=true"], ["data_dir=elsewhere"], ["callbacks.progress.enabled=false"],
    ["callbacks.progress.refresh_rate=3"], ["trainer.enable_progress_bar=false"], ["trainer.idle_timeout_s=99"],
    ["hydra.run.dir=here"], ["strategy=delayed"],
]  # fmt: skip
OTHER = [
    ["seed=2"], ["model.horizon=4.5"], ["strategy.slack=1"], ["strategy=backprop"], ["model.steps=9"],
    ["trainer.devices=2"], ["trainer.max_epochs=21"], ["strategy.optimizer.lr=0.002"],
    ["callbacks.stability.enabled=true"], ["dataset.batch_size=65"],
    ["strategy=dni", "strategy.estimator.hidden=[64,64]"],
]  # fmt: skip


@pytest.mark.parametrize("overrides", SAME, ids=" ".join)
def test_what_changes_no_result_does_not_matter(compose_config, plain, overrides):
    assert config_hash(to_plain(check(compose_config(*overrides)))) == config_hash(plain)


def test_what_changes_a_result_matters(compose_config, plain):
    hashes = {config_hash(to_plain(check(compose_config(*overrides)))) for overrides in OTHER}
    assert len(hashes | {config_hash(plain)}) == len(OTHER) + 1


def test_a_checkpoint_matters_only_to_who_tests_it(plain):
    assert config_hash(plain | {"ckpt": "a"}) == config_hash(plain)
    tested = plain | {"mode": "test"}
    assert len({config_hash(tested | {"ckpt": ckpt}) for ckpt in "ab"} | {config_hash(plain)}) == 3


def leave(folder: Path, plain: dict[str, Any], age: float = 0, **changes: Any) -> Path:
    """A run's metrics."""
    folder.mkdir(parents=True)
    metrics = {
        "run/status": "finished",
        "run/config_hash": config_hash(plain),
        "run/monitored": 0.5,
        **changes,
    }
    path = folder / "metrics.json"
    path.write_text(json.dumps(metrics))
    os.utime(path, (1e9 - age, 1e9 - age))
    return folder


def test_the_newest_finished_run_is_found_wherever_runs_are(plain, tmp_path):
    outputs, sweep = tmp_path / "outputs", tmp_path / "sweep"
    assert find_completed(plain, outputs, sweep) is None
    old = leave(outputs / "2026-01-01/10-digits", plain, age=30)
    assert find_completed(plain, outputs) == (old, 0.5)
    job = leave(outputs / "multirun/2026-01-01/11/0-digits", plain, age=20, **{"run/monitored": 0.75})
    assert find_completed(plain, outputs, sweep) == (job, 0.75)
    newest = leave(sweep / "0-digits", plain, age=10, **{"run/monitored": None})
    found = find_completed(plain, outputs, sweep)
    assert found is not None
    assert found.folder == newest and found.monitored != found.monitored
    assert find_completed(plain | {"seed": 2}, outputs, sweep) is None


def test_what_is_unfinished_foreign_or_torn_is_passed_over(plain, tmp_path):
    day = tmp_path / "outputs" / "2026-01-01"
    leave(day / "a", plain, **{"run/status": "failed"})
    torn = leave(day / "b", plain) / "metrics.json"
    torn.write_text(torn.read_text()[:-9])
    leave(day / "c", plain, **{"run/config_hash": None})
    (leave(day / "d", plain) / "metrics.json").write_text("[1]")
    (leave(day / "e", plain) / "metrics.json").write_bytes(b"\xff\xfe")
    assert find_completed(plain, tmp_path / "outputs") is None
