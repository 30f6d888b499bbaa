"""An objective that processors evaluate together: the same value as one finds, and what it has cost each."""

from __future__ import annotations

import pytest

from sglight.strategies.pvd.sharing import Tally, times
from tests.strategies.common import IMAGES, NETWORK
from tests.strategies.pvd.common import shared


def test_one_processor_finds_what_all_find_bit_for_bit() -> None:
    f = shared(IMAGES)
    point = f.objective.read()
    together, alone_ = f.evaluate(point), f.alone(1, point, "local")
    assert (together.value, together.accuracy) == (alone_.value, alone_.accuracy)


def test_what_is_evaluated_is_counted_by_processor() -> None:
    f = shared(NETWORK, largest=3)
    point = f.objective.read()
    f.evaluate(point)
    f.differentiate(point, "directions")
    f.alone(2, point, "local")
    assert sum(tally.samples["gradient"] for tally in f.tallies.values()) == 20
    assert sum(tally.samples["function"] for tally in f.tallies.values()) == 20 + 20
    assert [tally.seconds["local"] > 0 for tally in f.tallies.values()] == [False, False, True]


def test_an_overflow_is_infinitely_bad() -> None:
    f = shared({**NETWORK, "activation": "relu"})
    assert f.evaluate([1e30 * block for block in f.objective.read()]).value == float("inf")


def test_the_speed_up_is_the_sum_over_the_slowest_of_each_phase() -> None:
    tallies = [Tally(), Tally()]
    tallies[0].seconds |= {"directions": 1.0, "local": 4.0, "synchronisation": 1.0}
    tallies[1].seconds |= {"directions": 1.0, "local": 2.0, "synchronisation": 2.0}
    found = times(tallies, serial_s=1.0)
    assert found["speedup/theoretical"] == pytest.approx((6 + 5 + 1) / (1 + 4 + 2 + 1))
    assert found["time/processor_1/local_s"] == 2.0
