"""Undocumented parts of TensorBoard's reader and of torch's writer that sglight depends on; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData


class Scalar(NamedTuple):
    """One value of a curve: its tag, the step, the time in seconds since 1970."""

    tag: str
    step: int
    time: float
    value: float


def read_scalars(path: Path) -> Iterator[Scalar]:
    """The scalars in a file of events, up to its end or to the first place that is damaged or incomplete.

    `EventAccumulator` would read the whole folder into memory, log a warning for each damage, and drop points.
    """
    try:
        for data in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(data)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    yield Scalar(value.tag, event.step, event.wall_time, value.simple_value)
    except (OSError, DecodeError):
        return


def add_summary(writer: Any, summary: Any) -> None:
    """Write a summary to the file of a `SummaryWriter`, whose public methods would open another file for it."""
    writer._get_file_writer().add_summary(summary)


def name_columns(page: Any, name: Callable[[str], str]) -> None:
    """Set the names under which TensorBoard's hyperparameter page shows metrics.

    Args:
        page: the first of the summaries that torch makes for it.
        name: maps the tag of a metric to its name.
    """
    plugin = page.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for info in content.experiment.metric_infos:
        info.display_name = name(info.name.tag)
    plugin.content = content.SerializeToString()
