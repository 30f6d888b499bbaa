"""Processors of parallel variable distribution on several workers: the result is that of one process, bit for bit."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from sglight.parallel.strategy import StageStrategy
from sglight.strategies.pvd import PVD
from tests.parallel.test_strategy import assert_same
from tests.parallel.training import Job, Result, train_on
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches

# Generous: beside other work the first workers of a process take half a minute to start.
pytestmark = pytest.mark.timeout(300)

SEGMENTS = {**IMAGES, "shape": (1, 8, 8), "channels": [4, 6], "steps": [3, 3], "reversible": True}
# More shares of the samples than chunks, and fewer.
JOBS: dict[str, Job] = {
    "affine": {"network": NETWORK, "options": {"processors": 3, "chunk_samples": 10}, "epochs": 3},
    "best": {"network": {**NETWORK, "dynamics": "euler"}, "options": {"processors": 4, "synchronisation": "best"}},
    "average": {
        "network": SEGMENTS,
        "options": {"processors": 3, "synchronisation": "average", "objective_samples": 2},
    },
    "lbfgs": {"network": NETWORK, "options": {"processors": 3, "local_solver": "lbfgs", "local_steps": 3}},
    "penalties": {
        "network": {**NETWORK, "dynamics": "leapfrog"},
        "options": {"processors": 3, "regularisation": {"smoothness": 0.1}, "forget_me_not": False},
        "optimizer": {**ADAM, "weight_decay": 0.01},
    },
    "stopped in mid-iteration": {"network": NETWORK, "options": {"processors": 3}, "trainer": {"max_steps": 10}},
}  # fmt: skip


STRAIGHT: Job = {"network": IMAGES, "options": {"processors": 3, "local_steps": 2}, "epochs": 3}


@cache
def alone() -> list[Result]:
    """The results of one process: of the jobs, and of `STRAIGHT`."""
    return train_on(1, [*JOBS.values(), STRAIGHT])


def test_every_placement_gives_the_same(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    train_on(1, [{**STRAIGHT, "callbacks": [saver]}])
    # From an epoch's end, and from mid-epoch: one process has written, several go on.
    resumed = [{**STRAIGHT, "ckpt": str(tmp_path / f"step={step}.ckpt")} for step in (9, 15)]
    found = train_on(2, [*JOBS.values(), *resumed])
    *expected, whole = alone()
    for name, a, b in zip([*JOBS, "resumed", "resumed"], found, [*expected, whole, whole], strict=True):
        print(name)
        assert_same(a, b)


@pytest.mark.slow
def test_a_worker_a_processor_gives_the_same_and_is_read_by_one_process(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    found = train_on(3, [*JOBS.values(), {**STRAIGHT, "callbacks": [saver]}])
    expected = alone()
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)
    for step in (6, 9, 18):
        assert_same(train_on(1, [{**STRAIGHT, "ckpt": str(tmp_path / f"step={step}.ckpt")}])[0], expected[-1])


def test_a_plain_trainer_with_workers_trains_a_module_that_was_trained_before() -> None:
    data = DataLoader(batches(3), batch_size=None)
    quiet: dict[str, Any] = {
        "max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    module = PVD(NETWORK, ADAM, processors=2)
    module.configure_model()
    start = copy.deepcopy(module.state_dict())
    pl.Trainer(**quiet).fit(module, data)
    expected = copy.deepcopy(module.state_dict())
    module.load_state_dict(start)
    trainer = pl.Trainer(**quiet, devices=2, strategy=StageStrategy(threads=1))
    trainer.fit(module, data)
    assert_equal(module.state_dict(), expected)
    assert float(trainer.callback_metrics["pvd/gradient_evaluations"]) > 0


def test_processors_are_shared_out_evenly() -> None:
    module = PVD(NETWORK, ADAM, processors=5)
    assert [len(group) for group in module.groups(2)] in ([2, 3], [3, 2])
    assert [len(group) for group in module.groups(5)] == [1] * 5
    with pytest.raises(ValueError, match=r"6 workers for 5 processor\(s\): raise strategy\.processors"):
        module.groups(6)
