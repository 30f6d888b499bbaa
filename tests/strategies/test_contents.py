"""What a checkpoint says of itself, and Lightning's own ways to use it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from sglight.archive import DATA
from sglight.data.planar import PlanarData
from sglight.strategies import contents
from sglight.strategies.backprop import Backprop
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.multilevel import Multilevel
from sglight.strategies.pvd import PVD
from sglight.strategies.staged import StagedModule

NETWORK = {"shape": (2,), "classes": 2, "channels": 4, "steps": 4, "horizon": 2.0, "seed": 3}
KINDS: dict[type[StagedModule], dict[str, Any]] = {
    Backprop: {},
    DNI: {"stages": 2, "clip_norm": 1.0},
    Delayed: {"stages": 2, "microbatches": 2},
    Multilevel: {"stages": 2, "levels": 2, "level": {"epochs": [1, None]}},
    PVD: {"processors": 2},
}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[StagedModule, pl.Trainer, Path]:
    """A module of each kind after an epoch or two, its trainer, and its checkpoint."""
    data = PlanarData("ellipse", train_points=80, val_points=20, test_points=20, batch_size=40)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1 + (request.param is Multilevel), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    module = request.param(NETWORK, {"name": "adam", "lr": 1e-2}, **KINDS[request.param])
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return module, trainer, tmp_path / "a.ckpt"


def test_lightnings_own_ways(trained: tuple[StagedModule, pl.Trainer, Path]) -> None:
    """A module from its checkpoint alone computes the same, and `Trainer.predict` does, with labels and without."""
    module, trainer, path = trained
    again = type(module).load_from_checkpoint(path)
    x = torch.randn(6, 2)
    with torch.no_grad():
        expected = module(x).softmax(1)
        assert torch.equal(again(x).softmax(1), expected)
    pairs = DataLoader([(x, torch.zeros(6, dtype=torch.int64))], batch_size=None)
    for loader in (pairs, DataLoader([x], batch_size=None)):
        (found,) = trainer.predict(again, loader)
        assert torch.equal(found, expected)
    assert torch.cat(trainer.predict(module, trainer.datamodule)).shape == (20, 2)
    facts = torch.load(path, weights_only=True)[DATA]
    data = trainer.datamodule
    assert facts == {
        "name": "ellipse", "shape": [2], "classes": 2, "class_names": data.class_names, "mean": data.mean,
        "std": data.std, "pixels": False,
    }  # fmt: skip


def test_arguments_are_those_of_the_call() -> None:
    class Shown:
        def __init__(self, a: int, b: int = 2, **rest: int) -> None: ...

    assert contents.arguments(Shown, (1,), {"c": 3}) == {"a": 1, "c": 3}
    assert contents.arguments(Shown, (), {}) == {}


def test_plain() -> None:
    """Whatever a script or a config gives becomes what `torch.load(weights_only=True)` reads."""
    kind = StrEnum("kind", ["adam"])
    value = {"a": (1, kind.adam), "b": OmegaConf.create({"c": [1.5, None]}), "d": np.arange(2)}
    found = contents.plain(value)
    assert found == {"a": [1, "adam"], "b": {"c": [1.5, None]}, "d": [0, 1]}
    assert type(found["a"][1]) is str
    assert contents.plain_or_nothing({"f": print}) == {}
