"""The layout of TensorBoard's custom scalars finds the tags that runs write."""

from __future__ import annotations

import re
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from sglight.callbacks.memory import PeakMemory
from sglight.callbacks.stability import StabilityMonitor
from sglight.callbacks.tensorboard import LAYOUT, add_layout
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
    tags = events.Tags()["scalars"]
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
