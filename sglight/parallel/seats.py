"""Which worker holds which stages of which replica."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sglight.strategies.schedule import stage_names


class Seat(NamedTuple):
    """A worker's place: the number of its group of stages, and which replica of these it holds."""

    group: int
    replica: int


def seats(groups: int, replicas: int, layout: str = "pipelines") -> list[Seat]:
    """The seats of all workers, by rank; workers of neighbouring ranks share a machine.

    Args:
        layout: ``pipelines``: the stages of a replica follow each other; ``replicas``: the replicas of a group do.
    """
    if layout == "pipelines":
        return [Seat(group, replica) for replica in range(replicas) for group in range(groups)]
    return [Seat(group, replica) for group in range(groups) for replica in range(replicas)]


def of_trainer(trainer: Mapping[str, Any]) -> list[Seat]:
    """The seats that the section ``trainer`` of a config asks for."""
    replicas = trainer["replicas"]
    groups = trainer["devices"] * trainer["num_nodes"] // replicas
    return seats(groups, replicas, trainer["layout"])


def seat_name(stages: range, seat: Seat, replicas: int, part: str = "stage") -> str:
    """What a worker holds: ``stages 2-3``, or ``stages 2-3, replica 1`` where there are several."""
    return stage_names(stages, part) + (f", replica {seat.replica}" if replicas > 1 else "")
