"""Delayed gradients on several workers are those of one process, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks import ModelCheckpoint

from tests.parallel.training import Job, train_all, train_on
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


@pytest.mark.parametrize(("workers", "shared"), [(2, True), (2, False), (4, True)])
def test_every_placement_gives_the_same_parameters(workers: int, shared: bool) -> None:
    alone, together = train_all(JOBS), train_on(workers, JOBS, shared)
    for one, several in zip(alone, together, strict=True):
        assert_equal(several.parameters, one.parameters)
        assert several.steps == one.steps * workers


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1), (2, 4)])
def test_a_training_goes_on_in_another_placement(first: int, second: int, tmp_path: Path) -> None:
    job: dict[str, Any] = {**JOBS[1], "options": {**JOBS[1]["options"], "microbatches": 2}}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    (straight,) = train_on(first, [{**job, "callbacks": [saver]}])
    (resumed,) = train_on(second, [{**job, "ckpt": tmp_path / "step=4.ckpt"}])
    assert_equal(resumed.parameters, straight.parameters)
