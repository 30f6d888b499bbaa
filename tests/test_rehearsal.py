"""What a rehearsal measures, and that it leaves no trace."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from sglight.rehearsal import rehearse
from sglight.strategies.backprop import Backprop
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from tests.strategies.common import ADAM, NETWORK

SAMPLES = 12


class Counting(Backprop):
    """Keeps the size of the parts on which replicas train."""

    parts: ClassVar[set[int]] = set()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.parts.update(len(labels) for _, labels in self.runtime.shares(*batch))
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize("at_once", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_stage_goes_forward_and_backward(at_once: int) -> None:
    found = rehearse(Delayed(NETWORK, ADAM, stages=2, microbatches=2), SAMPLES, 2, at_once, 1)
    assert len(found) == 2
    assert all(stage.forward > 0 and stage.backward > 0 for stage in found)
    assert all(stage.estimate == stage.learn == 0 for stage in found)


def test_estimators_cost_something_too() -> None:
    first, last = rehearse(DNI(NETWORK, ADAM, stages=2), SAMPLES, 1, 1, 1)
    assert first.estimate > 0
    assert first.learn > 0
    assert last.estimate == last.learn == 0


def test_a_replica_trains_on_its_part() -> None:
    Counting.parts.clear()
    rehearse(Counting(NETWORK, ADAM), SAMPLES, 3, 1, 1)
    assert Counting.parts == {4}


def test_the_module_is_not_changed() -> None:
    module = Backprop(NETWORK, ADAM)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rehearse(module, SAMPLES, 1, 1, 1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
