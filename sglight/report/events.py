"""Reads the curves of a run from TensorBoard's event files or from `metrics.csv`, also while it is running."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from math import isfinite, nan
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sglight.compat.tensorboard import Scalar, read_scalars

EVENTS = "events.out.tfevents.*"
TABLE = "metrics.csv"


class Curve(NamedTuple):
    """A scalar over the training; all arrays have shape ``[N]``.

    Attributes:
        step: the number of the batch, increasing.
        elapsed: seconds of training since its first record; NaN if they are not known.
        value: finite numbers.
    """

    step: np.ndarray
    elapsed: np.ndarray
    value: np.ndarray


def read_curves(folder: Path) -> dict[str, Curve]:
    r"""All scalars of the run in ``folder`` by tag; empty if there is nothing that can be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "metrics.csv").write_text("step,val/acc\n9,0.5\n19,0.75\n")
    ...     curve = read_curves(Path(folder))["val/acc"]
    >>> curve.step.tolist(), curve.value.tolist()
    ([9.0, 19.0], [0.5, 0.75])
    """
    files = (path for path in folder.glob(EVENTS) if path.is_file())
    sessions = [session for path in files if (session := _events(path))]
    if sessions:
        return _collect(_one_clock(sorted(sessions, key=lambda session: session[0].time)))
    return _collect(list(_rows(folder / TABLE)))


def _events(path: Path) -> list[Scalar]:
    """The scalars in an event file whose values are finite."""
    return [scalar for scalar in read_scalars(path) if isfinite(scalar.value)]


def _one_clock(sessions: list[list[Scalar]]) -> list[Scalar]:
    """Joins the records of all sessions of a run that was resumed, with times in seconds of training.

    Pauses between sessions do not count. Records of steps that a later session trains again are dropped.
    """
    records: list[Scalar] = []
    for session in sessions:
        first, begun = min(r.step for r in session), session[0].time
        records = [r for r in records if r.step < first]
        before = max((r.time for r in records), default=0.0)
        records += [r._replace(time=before + r.time - begun) for r in session]
    return records


def _rows(path: Path) -> Iterator[Scalar]:
    """The values in Lightning's CSV log, which has no times; a last row that is incomplete is left out."""
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
                yield Scalar(tag, int(row["step"]), nan, value)


def _number(cell: object) -> float:
    try:
        return float(cell) if isinstance(cell, str) else nan
    except ValueError:
        return nan


def _collect(records: list[Scalar]) -> dict[str, Curve]:
    """Curves by tag; if a step has several values the last one counts."""
    by_tag: dict[str, dict[int, Scalar]] = defaultdict(dict)
    for record in records:
        by_tag[record.tag][record.step] = record
    return {tag: _curve([at[step] for step in sorted(at)]) for tag, at in by_tag.items()}


def _curve(records: list[Scalar]) -> Curve:
    columns = ([r.step for r in records], [r.time for r in records], [r.value for r in records])
    return Curve(*(np.array(column, dtype=float) for column in columns))
