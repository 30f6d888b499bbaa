"""The curves of a run: TensorBoard's events or `metrics.csv`, as far as they are written."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from math import isfinite, nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event

EVENTS = "events.out.tfevents.*"
TABLE = "metrics.csv"


class Curve(NamedTuple):
    """A scalar over the training.

    Attributes:
        step: batches, increasing, ``[N]``.
        elapsed: seconds since the training's first record, not a number where nobody knows, ``[N]``.
        value: ``[N]``, finite.
    """

    step: np.ndarray
    elapsed: np.ndarray
    value: np.ndarray


class Record(NamedTuple):
    """One value of one scalar."""

    tag: str
    step: int
    time: float
    value: float


def read_curves(folder: Path) -> dict[str, Curve]:
    """All scalars of the run in ``folder`` by tag; none if nothing is written, or nothing that can be read."""
    files = (path for path in folder.glob(EVENTS) if path.is_file())
    sessions = [session for path in files if (session := list(_events(path)))]
    if sessions:
        return _collect(_one_clock(sorted(sessions, key=lambda session: session[0].time)))
    return _collect(list(_rows(folder / TABLE)))


def _events(path: Path) -> Iterator[Record]:
    """The scalars of a file of events up to its end, or to where it is damaged or still being written."""
    try:
        for data in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(data)
            for value in event.summary.value:
                # Not a number: a loss that has diverged.
                if value.HasField("simple_value") and isfinite(value.simple_value):
                    yield Record(value.tag, event.step, event.wall_time, value.simple_value)
    except (OSError, DecodeError):
        return


def _one_clock(sessions: list[list[Record]]) -> list[Record]:
    """The records of all sessions, their time in seconds of training.

    A session goes on where its first step was left: the pauses between sessions do not count, nor what was trained
    twice, which is dropped.
    """
    records: list[Record] = []
    for session in sessions:
        first, begun = min(r.step for r in session), session[0].time
        records = [r for r in records if r.step < first]
        before = max((r.time for r in records), default=0.0)
        records += [r._replace(time=before + r.time - begun) for r in session]
    return records


def _rows(path: Path) -> Iterator[Record]:
    """The values of Lightning's CSV log, which knows no times, without a row that is still being written."""
    try:
        text = path.read_text() if path.is_file() else ""
    except (OSError, UnicodeDecodeError):
        return
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        if not (row.get("step") or "").isdigit():
            continue
        for tag, cell in row.items():
            value = _number(cell)
            if isinstance(tag, str) and tag != "step" and isfinite(value):
                yield Record(tag, int(row["step"]), nan, value)


def _number(cell: object) -> float:
    try:
        return float(cell) if isinstance(cell, str) else nan
    except ValueError:
        return nan


def _collect(records: list[Record]) -> dict[str, Curve]:
    """Curves by tag, the last of several values at a step."""
    by_tag: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in records:
        by_tag[record.tag][record.step] = record
    return {tag: _curve([at[step] for step in sorted(at)]) for tag, at in by_tag.items()}


def _curve(records: list[Record]) -> Curve:
    columns = ([r.step for r in records], [r.time for r in records], [r.value for r in records])
    return Curve(*(np.array(column, dtype=float) for column in columns))
