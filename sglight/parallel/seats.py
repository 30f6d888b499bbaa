"""Assigns to each worker its stages and its replica."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sglight.strategies.schedule import stage_names


class Seat(NamedTuple):
    """The place of a worker: the number of its group of stages, and the number of its replica of them."""

    group: int
    replica: int


def seats(groups: int, replicas: int, layout: str = "pipelines") -> list[Seat]:
    """The seats of all workers, in the order of their ranks. Workers with neighbouring ranks share a machine.

    Args:
        groups: the number of groups of stages.
        replicas: the number of replicas of each.
        layout: ``pipelines`` if the groups of one replica have neighbouring ranks, ``replicas`` if the replicas of
            one group have.

    >>> seats(groups=2, replicas=2)[:2]
    [Seat(group=0, replica=0), Seat(group=1, replica=0)]
    >>> seats(groups=2, replicas=2, layout="replicas")[:2]
    [Seat(group=0, replica=0), Seat(group=0, replica=1)]
    """
    if layout == "pipelines":
        return [Seat(group, replica) for replica in range(replicas) for group in range(groups)]
    return [Seat(group, replica) for group in range(groups) for replica in range(replicas)]


def of_trainer(trainer: Mapping[str, Any]) -> list[Seat]:
    """The seats that follow from the section ``trainer`` of a config."""
    replicas = trainer["replicas"]
    groups = trainer["devices"] * trainer["num_nodes"] // replicas
    return seats(groups, replicas, trainer["layout"])


def seat_name(stages: range, seat: Seat, replicas: int, part: str = "stage") -> str:
    """The name of a seat: ``stages 2-3``, or ``stages 2-3, replica 1`` if there are several replicas."""
    return stage_names(stages, part) + (f", replica {seat.replica}" if replicas > 1 else "")
