"""The layout of TensorBoard's custom scalars finds the tags that runs write."""

from __future__ import annotations

import re
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from tensorboard.plugins.hparams import metadata as hparams_metadata

from sglight.callbacks.memory import PeakMemory
from sglight.callbacks.stability import StabilityMonitor
from sglight.callbacks.tensorboard import LAYOUT, add_hyperparameters, add_layout, add_results
from sglight.callbacks.timing import EpochTimer
from tests.callbacks.common import fit


def test_every_chart_finds_a_tag_and_tensorboard_the_layout(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    add_layout(logger)
    callbacks = [StabilityMonitor(tmp_path), EpochTimer(), PeakMemory()]
    trainer = fit([*callbacks], tmp_path, logger=logger, diagnose_every_n_batches=1)
    trainer.test(trainer.lightning_module, datamodule=trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    # These only a multilevel training writes, and one that rebuilds states.
    tags = [
        *events.Tags()["scalars"],
        "level",
        "refinement/loss_before",
        "stage_0/drift",
        "result/speedup/backprop",
    ]
    for group in LAYOUT.values():
        for title, patterns in group.items():
            assert any(re.search(pattern, tag) for pattern in patterns for tag in tags), title
    (written,) = events.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(written.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    assert [chart.title for chart in layout.category[0].chart] == ["training", "validation", "test"]
    assert list(layout.category[0].chart[1].multiline.tag) == ["^val/acc$"]


def test_other_loggers_are_left_alone(tmp_path: Path) -> None:
    add_layout(CSVLogger(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_page_of_hyperparameters_has_columns_and_the_curves_no_point_of_them(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="", default_hp_metric=False)
    add_hyperparameters(logger, {"model.steps": 8, "strategy": "dni"}, ["val/acc", "test/acc"])
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert not events.Tags()["scalars"]
    contents = {
        tag: data.plugin_data.content
        for tag, data in events.summary_metadata.items()
        if data.plugin_data.plugin_name == hparams_metadata.PLUGIN_NAME
    }
    page = hparams_metadata.parse_experiment_plugin_data(contents[hparams_metadata.EXPERIMENT_TAG])
    assert [each.name for each in page.hparam_infos] == ["model.steps", "strategy"]
    assert [each.name.tag for each in page.metric_infos] == ["result/val/acc", "result/test/acc"]
    assert [each.display_name for each in page.metric_infos] == ["val/acc", "test/acc"]
    run = hparams_metadata.parse_session_start_info_plugin_data(
        contents[hparams_metadata.SESSION_START_INFO_TAG]
    )
    assert run.hparams["model.steps"].number_value == 8
    assert "model.steps: 8" in (tmp_path / "hparams.yaml").read_text()


def test_results_are_points_of_their_own_and_what_is_unknown_is_none(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="", default_hp_metric=False)
    add_results(logger, {"val/acc": 0.9, "speedup/backprop": None}, 7)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["result/val/acc"]
    (point,) = events.Scalars("result/val/acc")
    assert (point.step, round(point.value, 6)) == (7, 0.9)
