"""What a processor returns: where it is, or where it began."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglight.strategies.pvd.acceptance import NoWorse
from sglight.strategies.pvd.directions import Directions
from sglight.strategies.pvd.local import FirstOrder
from sglight.strategies.pvd.objective import Evaluated, Point
from sglight.strategies.pvd.processor import Processor
from sglight.strategies.pvd.sharing import SharedObjective
from sglight.strategies.pvd.subproblem import Subproblem, candidate
from tests.strategies.common import ADAM, NETWORK
from tests.strategies.pvd.common import samples, shared


def begun(own: int, rate: float) -> tuple[Processor, SharedObjective, Evaluated, Point]:
    """A processor that has taken a step on a batch, the objective, and from where it began."""
    f = shared(NETWORK)
    start = f.evaluate(f.objective.read())
    directions = Directions("rms")(f.differentiate(start.point)[1])
    solver = FirstOrder({**ADAM, "lr": rate}, 1, None)
    processor = Processor(Subproblem(own, start.point, True), solver, NoWorse(), f)
    processor.begin(start.point, directions)
    sums = processor.descend([samples(NETWORK)], lambda optimizer, closure: optimizer.step(closure))
    # Those of before the step.
    assert sums.loss / 20 + f.objective.penalties(start.point)[0] == pytest.approx(start.value)
    return processor, f, start, directions


def moments(processor: Processor) -> list[Any]:
    return [state["exp_avg"] for state in processor.optimizer.state.values()]


@pytest.mark.parametrize("own", range(3))
def test_what_is_accepted_is_where_it_is(own: int) -> None:
    processor, f, start, directions = begun(own, rate=1e-3)
    block, scalars, value, accuracy = processor.candidate(start, directions)
    found = f.evaluate(candidate(start.point, directions, own, block, scalars))
    assert (value, accuracy) == (found.value, found.accuracy)
    assert value < start.value
    assert not torch.equal(block, start.point[own]) and scalars.all()
    assert all(moment.any() for moment in moments(processor))


@pytest.mark.parametrize("own", range(3))
def test_what_is_refused_is_the_start_and_the_moments_are_forgotten(own: int) -> None:
    processor, _, start, directions = begun(own, rate=100.0)
    assert all(moment.any() for moment in moments(processor))
    block, scalars, value, accuracy = processor.candidate(start, directions)
    assert (value, accuracy) == (start.value, start.accuracy)
    assert torch.equal(block, start.point[own]) and not scalars.any()
    assert not any(moment.any() for moment in moments(processor))


def test_it_goes_on_from_a_position() -> None:
    processor, f, start, directions = begun(1, rate=1e-3)
    position, expected = processor.position(), processor.candidate(start, directions)
    processor.begin(start.point, directions)
    f.forget()
    processor.resume(start.point, directions, position)
    assert f.tallies[1].samples == position[2] and position[2]["gradient"] > 20
    found = processor.candidate(start, directions)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[2:] == expected[2:]
