"""Which points a processor may return."""

from __future__ import annotations

import math

import pytest

from sglight.strategies.pvd import PVD
from sglight.strategies.pvd.acceptance import ACCEPTANCES, Acceptance
from sglight.strategies.pvd.objective import Evaluated
from tests.strategies.common import ADAM, NETWORK, batches, fit


@pytest.mark.parametrize("name", ACCEPTANCES)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1.5, math.nextafter(1.0, 2.0)])
def test_what_is_worse_or_no_number_is_refused(name: str, value: float) -> None:
    assert not ACCEPTANCES[name]().accepts(Evaluated([], value), Evaluated([], 1.0))


@pytest.mark.parametrize("name", ACCEPTANCES)
def test_what_is_better_is_accepted(name: str) -> None:
    assert ACCEPTANCES[name]().accepts(Evaluated([], 0.5), Evaluated([], 1.0))


def test_no_worse_accepts_what_is_as_good() -> None:
    assert ACCEPTANCES["no_worse"]().accepts(Evaluated([], 1.0), Evaluated([], 1.0))


@pytest.mark.parametrize("accepted", [False, True])
def test_a_rule_is_added_as_a_class_and_its_name(accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant(Acceptance):
        def accepts(self, found: Evaluated, start: Evaluated) -> bool:
            return accepted

    monkeypatch.setitem(ACCEPTANCES, "constant", Constant)
    overshooting = {**ADAM, "lr": 10.0}
    module = PVD(NETWORK, overshooting, processors=2, acceptance="constant", synchronisation="best")
    report = fit(module, batches(3)).callback_metrics
    candidates = [float(report[f"pvd/candidate_{i}"]) for i in range(2)]
    before = float(report["pvd/objective_before"])
    assert all(value > before for value in candidates) if accepted else candidates == [before, before]
