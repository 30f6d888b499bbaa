"""Published results beside ours: the entries of `literature.yaml` that match the configs of runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sglight.report.groups import Group
from sglight.report.measures import MEASURES, Comparison

FILE = Path(__file__).with_name("literature.yaml")


@dataclass(frozen=True)
class Reference:
    """One entry of `literature.yaml`, where its fields are explained."""

    source: str
    where: str
    differs: str
    match: Mapping[str, Any]
    metric: str
    value: float

    def suits(self, group: Group) -> bool:
        """Whether every run of the group has all values of ``match``."""
        return all(
            run.config.get(key) in (value if isinstance(value, list) else [value])
            for run in group.runs
            for key, value in self.match.items()
        )

    @property
    def text(self) -> str:
        """The published value with its unit."""
        return next(measure.show(self.value, None) for measure in MEASURES if measure.key == self.metric)


@dataclass(frozen=True)
class Beside:
    """A published result and the one of a group that matches it."""

    group: Group
    reference: Reference
    measure: str
    ours: str


@cache
def references() -> list[Reference]:
    """All entries of the file."""
    return [Reference(**entry) for entry in yaml.safe_load(FILE.read_text())]


def beside(comparison: Comparison) -> list[Beside]:
    """The published results that match the groups of a comparison."""
    measures = {measure.key: measure for measure in MEASURES}
    return [
        Beside(group, reference, measures[reference.metric].title, measures[reference.metric].text(ours))
        for group, row in zip(comparison.task.groups, comparison.rows, strict=True)
        for reference in references()
        if reference.suits(group) and (ours := row.get(reference.metric)) is not None
    ]
