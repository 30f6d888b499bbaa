"""Delayed gradients on several workers are those of one process, bit for bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import ModelCheckpoint

from sglight.strategies.backprop import Backprop
from sglight.strategies.multilevel import Multilevel
from tests.parallel.training import Job, Result, train_all, train_on
from tests.strategies.common import IMAGES, NETWORK, assert_equal

DEEP = {**NETWORK, "steps": 8}
JOBS: list[Job] = [
    {"network": network, "options": {"stages": 4, "microbatches": m, "slack": slack, "backward": backward}}
    for network, m, slack, backward in (
        (DEEP, 1, 0, "stashed"),
        (DEEP, 3, 1, "stashed"),
        ({**IMAGES, "steps": 8, "normalisation": "batch"}, 2, 0, "stashed"),
        ({**IMAGES, "steps": 8}, 4, 0, "replayed"),
        ({**DEEP, "dynamics": "leapfrog"}, 2, 1, "rebuilt"),
        ({**IMAGES, "steps": 8}, 1, 0, "rebuilt"),
    )
]


@cache
def alone(jobs: str) -> list[Result]:
    """The results of one process."""
    return train_all(globals()[jobs])


@pytest.mark.parametrize(("workers", "shared"), [(2, True), (2, False), (4, True)])
def test_every_placement_gives_the_same_parameters(workers: int, shared: bool) -> None:
    for one, several in zip(alone("JOBS"), train_on(workers, JOBS, shared), strict=True):
        assert_equal(several.parameters, one.parameters)
        assert several.steps == one.steps * workers


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 4)])
def test_a_training_goes_on_in_another_placement(first: int, second: int, tmp_path: Path) -> None:
    job: dict[str, Any] = {**JOBS[1], "options": {**JOBS[1]["options"], "microbatches": 2}}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    (straight,) = train_on(first, [{**job, "callbacks": [saver]}])
    (resumed,) = train_on(second, [{**job, "ckpt": tmp_path / "step=4.ckpt"}])
    assert_equal(resumed.parameters, straight.parameters)


EXACT: list[Job] = [
    {"network": DEEP, "kind": Backprop, "options": {"stages": 4, "microbatches": 3}},
    {"network": {**IMAGES, "steps": 8}, "kind": Backprop, "options": {"stages": 4, "clip_norm": 0.05}},
    {
        "network": DEEP, "kind": Multilevel,
        "options": {"stages": 4, "microbatches": 2, "level": {"mode": ["exact", "delayed"]}},
    },
    {"network": DEEP, "options": {"stages": 4, "microbatches": 2, "exact_epochs": 0.6}},
]  # fmt: skip


@pytest.mark.parametrize("workers", [2, 4])
def test_pipelines_that_empty_and_levels_of_both_kinds_do_not_depend_on_the_placement(workers: int) -> None:
    for one, several in zip(alone("EXACT"), train_on(workers, EXACT), strict=True):
        assert_equal(several.parameters, one.parameters)
