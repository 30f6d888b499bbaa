"""The picture of the estimators' quality shows what the strategy has measured, over resumptions too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from matplotlib.image import imread
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sglight.callbacks.checkpoint import LastCheckpoint
from sglight.callbacks.gradient_quality import GradientQuality, draw
from sglight.gradients.base import COMPARED
from sglight.strategies.backprop import Backprop
from sglight.strategies.diagnosis import MEASURED
from sglight.strategies.dni import DNI
from tests.callbacks.common import NETWORK, data, fit


def test_the_history_is_that_of_the_curves(tmp_path: Path) -> None:
    logger, quality = (
        TensorBoardLogger(tmp_path, name=None, version=""),
        GradientQuality(tmp_path / "figures"),
    )
    trainer = fit([quality], tmp_path, epochs=3, logger=logger, diagnose_every_n_batches=2)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert quality.history.keys() == {
        *(f"boundary_0/{kind}" for kind in COMPARED),
        *(f"stage_{i}/{kind}" for i in range(2) for kind in MEASURED),
    }
    for name, points in quality.history.items():
        written = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in points] == [step for step, _ in written] == [0, 2, 4, 6, 8]
        assert [value for _, value in points] == pytest.approx([value for _, value in written])
    for picture in ("gradient_quality", "stage_gradients"):
        assert events.Images(f"figures/{picture}")
        assert imread(tmp_path / f"figures/{picture}.png")[..., :3].std() > 0.03
    assert not trainer.lightning_module.curves.listeners


def test_a_resumed_run_shows_all_of_it(tmp_path: Path) -> None:
    straight, first, second = (GradientQuality(tmp_path / name) for name in "abc")
    fit([straight], tmp_path, epochs=3, diagnose_every_n_batches=1)
    fit([first, LastCheckpoint(tmp_path)], tmp_path, epochs=2, diagnose_every_n_batches=1)
    fit([second], tmp_path, epochs=3, ckpt=tmp_path / "last.ckpt", diagnose_every_n_batches=1)
    assert second.history == straight.history
    assert len(second.history["boundary_0/cosine"]) == 9


def test_without_estimators_or_comparisons_nothing_is_drawn(tmp_path: Path) -> None:
    fit([GradientQuality(tmp_path / "never")], tmp_path, diagnose_every_n_batches=0)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[GradientQuality(tmp_path / "backprop")], logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Backprop(NETWORK, {"name": "adam", "lr": 1e-2}), data())
    assert not (tmp_path / "never").exists() and not (tmp_path / "backprop").exists()


def test_numbers_at_an_axis_are_whole() -> None:
    figure = draw({f"boundary_0/{kind}": [(0, 0.99982), (9, 0.99986)] for kind in COMPARED})
    figure.draw_without_rendering()
    assert not any(axes.yaxis.get_offset_text().get_text() for axes in figure.axes)


def test_every_boundary_has_its_curve() -> None:
    history = {f"boundary_{i}/{kind}": [(0, 0.1), (5, 0.5)] for i in (0, 1, 10) for kind in COMPARED}
    panels = draw(history).axes
    assert [axes.get_ylabel() for axes in panels] == [
        "cosine",
        "relative error",
        "norm ratio",
        "sign agreement",
    ]
    for axes in panels:
        curves = [line for line in axes.get_lines() if str(line.get_label()).startswith("after")]
        assert [line.get_label() for line in curves] == [
            "after stage 0",
            "after stage 1",
            "after stage 10",
        ]
        assert len({str(line.get_color()) for line in curves}) == 3


class Fail(Callback):
    """Ends a training in its second batch."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            raise RuntimeError("on purpose")


def test_nobody_listens_behind_a_failed_fit(tmp_path: Path) -> None:
    module, quality = DNI(NETWORK, {"name": "adam", "lr": 1e-2}), GradientQuality(tmp_path)

    def train(*callbacks: Callback) -> None:
        trainer = pl.Trainer(
            accelerator="cpu", max_epochs=1, callbacks=[quality, *callbacks], logger=False, log_every_n_steps=1,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, data())

    with pytest.raises(RuntimeError, match="on purpose"):
        train(Fail())
    assert not module.curves.listeners
    train()
    assert [step for step, _ in quality.history["boundary_0/cosine"]] == [0]


def test_a_trainer_that_goes_on_shows_all_of_it(tmp_path: Path) -> None:
    quality = GradientQuality(tmp_path)
    trainer = fit([quality], tmp_path, epochs=1, diagnose_every_n_batches=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, data())
    assert [step for step, _ in quality.history["boundary_0/cosine"]] == list(range(6))


def test_a_state_of_another_version_does_no_harm(tmp_path: Path) -> None:
    quality = GradientQuality(tmp_path)
    quality.load_state_dict({})
    fit([quality], tmp_path, epochs=1)
    assert quality.history
