"""Cuts that a user gives, and measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from sglight.config.cuts import given_cuts
from sglight.strategies import balance
from sglight.strategies.backprop import Backprop
from sglight.strategies.balance import measured_cuts
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.multilevel import Multilevel
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches, fit

DEEP = {**NETWORK, "steps": 16}


@pytest.mark.parametrize("kind", [Backprop, DNI, Delayed, Multilevel])
def test_stages_begin_where_the_user_says(kind: type) -> None:
    module = kind(DEEP, ADAM, stages=3, cuts=[2, 10])
    assert module.plan.cuts in ((0, 2, 10, 16), (0, 1, 5, 8))
    assert module.identity()["strategy.cuts"] == [2, 10]


def test_equal_cuts_give_equal_results() -> None:
    automatic = Delayed(DEEP, ADAM, stages=3, microbatches=2)
    given = Delayed(DEEP, ADAM, stages=3, microbatches=2, cuts=list(automatic.cuts[1:-1]))
    for module in (automatic, given):
        fit(module, batches(4))
    assert_equal(given.state_dict(), automatic.state_dict())


@pytest.mark.parametrize(
    ("cuts", "stages", "multiple", "message"),
    [
        ([4], 3, 1, r"strategy\.cuts=\[4\] makes 2 stages, but strategy\.stages=3; set strategy\.stages=2"),
        ([4, 4], 3, 1, r"numbers of time steps from 1 to 15, each greater"),
        ([0, 4], 3, 1, r"from 1 to 15"),
        ([4, 16], 3, 1, r"from 1 to 15"),
        ([4, 6], 3, 4, r"6 must be a multiple of 4, so that the coarsest level has a cut there"),
    ],
)
def test_what_is_refused(cuts: list[int], stages: int, multiple: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given_cuts(cuts, 16, stages, multiple)


def test_measured_cuts_even_out_what_the_cost_model_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own the first four steps take ten times as long as the others."""
    seconds = [10.0] * 4 + [1.0] * 12

    def clock(_plan: object, cuts: Sequence[int], *_: object) -> list[float]:
        return [sum(seconds[a:b]) for a, b in pairwise(cuts)]

    monkeypatch.setattr(balance, "stage_seconds", clock)
    plan = Backprop(DEEP, ADAM, stages=2, microbatches=2).plan
    assert plan.cuts == (0, 8, 16)
    assert max(clock(plan, measured_cuts(plan, 12))) == 30.0  # three steps of ten


@pytest.mark.parametrize("backward", ["stashed", "replayed", "rebuilt"])
@pytest.mark.parametrize("network", [NETWORK, IMAGES], ids=["dense", "conv"])
def test_measured_cuts_are_cuts(network: dict[str, object], backward: str) -> None:
    plan = Delayed({**network, "dynamics": "hamiltonian"}, ADAM, stages=3, backward=backward).plan
    cuts = measured_cuts(plan, 12)
    assert cuts == given_cuts(cuts[1:-1], plan.spec.total_steps, 3)
