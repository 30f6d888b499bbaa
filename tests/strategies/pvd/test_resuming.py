"""Parallel variable distribution interrupted: by a checkpoint, by an error, by a second training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from sglight.strategies.pvd import PVD
from sglight.strategies.pvd.objective import flat
from tests.parallel.training import Resumable
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches
from tests.strategies.pvd.common import iterate

# What is resumed, and at which steps: in the first iteration, in the second, behind it.
STEPS = {"default": (1, 8, 10), "lbfgs": (8,), "drawn": (8,)}
RESUMED: dict[str, dict[str, Any]] = {
    "default": {"scheduler": {"name": "cosine", "min_factor": 0.1}},
    "lbfgs": {"local_solver": "lbfgs", "local_steps": 3, "directions": "normalised"},
    "drawn": {"objective_samples": 20, "synchronisation": "average"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_training_ends_bit_identical(name: str, tmp_path: Path) -> None:
    def train(ckpt: str | None = None, **options: Any) -> tuple[PVD, dict[str, Any]]:
        module = PVD(IMAGES, ADAM, processors=2, **RESUMED[name])
        trainer = pl.Trainer(
            max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, callbacks=options.pop("callbacks", []), **options,
        )  # fmt: skip
        data = Resumable(batches(5, shape=(1, 6, 6)))
        data.trainer = trainer
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
        return module, {k: v for k, v in trainer.callback_metrics.items() if k.startswith("pvd/")}

    straight, metrics = train(
        callbacks=[ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)]
    )
    for step in STEPS[name]:
        module, found = train(str(tmp_path / f"step={step}.ckpt"), enable_checkpointing=False)
        assert_equal(module.state_dict(), straight.state_dict())
        assert found == metrics


@pytest.mark.parametrize("step", [8, 10])  # in an iteration, and behind one
def test_a_training_that_goes_on_with_another_objective_compares_on_that(step: int, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step)
    watch, _ = iterate(
        PVD(NETWORK, ADAM, processors=2), batches(5), 2, callbacks=[saving], enable_checkpointing=True
    )
    heavier = PVD(NETWORK, {**ADAM, "weight_decay": 0.5}, processors=2)
    watch, _ = iterate(heavier, batches(5), 3, ckpt=str(tmp_path / f"step={step}.ckpt"))
    first, last = watch.reports[0], watch.reports[-1]
    x, y = (torch.cat(parts) for parts in zip(*batches(5), strict=True))
    with torch.no_grad():
        loss = float(F.cross_entropy(heavier(x), y))
    norm = float(watch.points[-1].square().sum())
    assert last["pvd/objective_after"] == pytest.approx(loss + 0.25 * norm, rel=1e-5)
    assert last["pvd/objective_after"] < first["pvd/objective_before"]


def test_an_error_leaves_the_weights_of_the_last_synchronisation() -> None:
    module = PVD(NETWORK, ADAM, processors=2)
    seen: list[torch.Tensor] = []

    class Fail(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(flat([p.detach() for p in pl_module.parameters()]))
            if len(seen) == 4:

                def broken(*_: Any) -> None:
                    next(pl_module.parameters()).data.add_(1)
                    raise OSError("no more")

                pl_module.iterations.shared.objective.on_batch = broken

    with pytest.raises(OSError, match="no more"):
        iterate(module, batches(3), epochs=2, callbacks=[Fail()])
    assert torch.equal(flat([p.detach() for p in module.parameters()]), seen[2])


def test_a_second_training_begins_anew_with_its_own_data() -> None:
    module = PVD(NETWORK, ADAM, processors=2)
    iterate(module, batches(3), epochs=2)
    other = batches(2, seed=5)
    watch, _ = iterate(module, other, epochs=1)
    fresh = PVD(NETWORK, ADAM, processors=2)
    fresh.configure_model()
    x, y = (torch.cat(parts) for parts in zip(*other, strict=True))
    assert watch.reports[0]["pvd/gradient_evaluations"] < 12
    assert watch.reports[0]["pvd/accuracy"] == pytest.approx(float((module(x).argmax(1) == y).float().mean()))
