"""Curves are written at the step that they are of, when all workers' values are there, and nobody waits."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from sglight.link import Alone, Pending
from sglight.strategies.curves import Curves

NAMES = ["train/loss", "train/acc", "estimator_0/loss"]


class Later(Pending):
    """Sums that arrive when they are told to."""

    def __init__(self, values: Sequence[float]) -> None:
        self.values, self.arrived, self.asked = list(values), False, False

    def ready(self) -> bool:
        return self.arrived

    def result(self) -> list[float]:
        self.asked = True
        return self.values


class Slow(Alone):
    """Another worker knows ``train/acc``: 0.5."""

    def __init__(self) -> None:
        self.pending: list[Later] = []

    def total(self, values: Sequence[float]) -> Pending:
        other = [0.0, 0.5, 0.0, 0.0, 1.0, 0.0]
        self.pending.append(Later([a + b for a, b in zip(values, other, strict=True)]))
        return self.pending[-1]


class Module:
    """Notes what is logged."""

    def __init__(self) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        self.shown: dict[str, float] = {}
        logger = SimpleNamespace(
            log_metrics=lambda values, step: self.written.append((step, values)), save=lambda: None
        )
        self.trainer = SimpleNamespace(loggers=[logger])

    def log(self, name: str, value: float, prog_bar: bool, logger: bool) -> None:
        assert not logger  # it would be written at the wrong step
        self.shown[name] = value


def test_what_is_late_is_written_at_its_own_step() -> None:
    curves, peers, module = Curves(), Slow(), Module()
    target: Any = module
    curves.report(peers, 10, 0, NAMES, {"train/loss": torch.tensor(2.0)})
    curves.write(target)
    assert not module.written
    assert not peers.pending[0].asked
    curves.report(peers, 20, 1, NAMES, {"train/loss": 1.0, "estimator_0/loss": float("nan")})
    peers.pending[0].arrived = True
    curves.write(target)
    assert module.written == [(10, {"epoch": 0.0, "train/loss": 2.0, "train/acc": 0.5})]
    curves.write(target, wait=True)
    step, values = module.written[1]
    assert step == 20
    assert values["train/loss"] == 1.0
    assert values["estimator_0/loss"] != values["estimator_0/loss"]  # not a number, but known
    assert module.shown["train/loss"] == 1.0


def test_listeners_hear_of_every_report_at_its_own_step() -> None:
    curves, peers, heard = Curves(), Slow(), list[tuple[int, float]]()
    curves.listeners.append(lambda step, values: heard.append((step, values["train/acc"])))
    target: Any = Module()
    for step in (10, 20):
        curves.report(peers, step, 0, NAMES, {})
    curves.write(target)
    assert not heard
    curves.write(target, wait=True)
    assert heard == [(10, 0.5), (20, 0.5)]


def test_alone_nothing_is_late() -> None:
    curves, module = Curves(), Module()
    target: Any = module
    curves.report(Alone(), 3, 0, NAMES, {"train/acc": 0.25})
    curves.write(target)
    assert module.written == [(3, {"epoch": 0.0, "train/acc": 0.25})]
