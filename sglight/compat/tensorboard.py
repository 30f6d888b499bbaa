"""Parts of TensorBoard's reader and of torch's writer that are not documented; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData


class Scalar(NamedTuple):
    """A value of one scalar: its tag, the step, the clock's time in seconds."""

    tag: str
    step: int
    time: float
    value: float


def read_scalars(path: Path) -> Iterator[Scalar]:
    """The scalars of a file of events up to its end, or to where it is damaged or still being written.

    `EventAccumulator` would read the whole folder into memory, log a warning for each damage, and thin curves out.
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
    """Write a summary as it is to the events of a `SummaryWriter`, whose own methods would make a file of its own."""
    writer._get_file_writer().add_summary(summary)


def name_columns(page: Any, name: Callable[[str], str]) -> None:
    """Give the metrics of a page of hyperparameters, torch's first summary of it, names of their own by their tags."""
    plugin = page.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for info in content.experiment.metric_infos:
        info.display_name = name(info.name.tag)
    plugin.content = content.SerializeToString()
