"""How far rebuilt states drift."""

from __future__ import annotations

import warnings

import pytest
import torch

from sglight.networks import NetworkSpec, Segment, Stage
from sglight.networks.drift import drift
from sglight.strategies.backprop import Backprop
from sglight.strategies.delayed import Delayed
from tests.strategies.common import ADAM, NETWORK, batches, fit

FAR = {**NETWORK, "dynamics": "leapfrog", "steps": 64, "horizon": 200.0}


@pytest.mark.parametrize("dynamics", ["hamiltonian", "leapfrog"])
@pytest.mark.parametrize("widths", [8, [8, 12]])
def test_it_is_the_error_of_going_there_and_back(dynamics: str, widths: int | list[int]) -> None:
    spec = NetworkSpec(**{**NETWORK, "dynamics": dynamics, "channels": widths, "steps": 16})
    stage, x = Stage(spec, 0, spec.total_steps).double(), batches(1)[0][0].double()
    exact = drift(stage, x)
    assert 0 <= exact < 1e-12
    single = drift(stage.float(), x.float())
    assert 1e-9 < single < 1e-3
    errors = []
    with torch.no_grad():
        state = stage.open(x.float()[:4])
        for part in stage.flow():
            out = part(state)
            if isinstance(part, Segment):
                errors.append(float((part.inverse(out) - state).norm() / state.norm()))
            state = out
    assert float(single) == pytest.approx(max(errors), rel=1e-6)


@pytest.mark.parametrize(
    "module",
    [
        lambda network: Delayed(network, ADAM, stages=2, microbatches=2, backward="rebuilt"),
        lambda network: Backprop({**network, "reversible": True}, ADAM),
    ],
)
def test_a_training_warns_where_it_is_large_and_only_there(module) -> None:  # type: ignore[no-untyped-def]
    with pytest.warns(UserWarning, match=r"states that stage \d rebuilds have a relative error of"):
        fit(module(FAR), batches(2), log_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*relative error")
        fit(module({**NETWORK, "dynamics": "leapfrog"}), batches(2), log_every_n_steps=1)


def test_it_is_logged_and_leaves_the_training_alone() -> None:
    torch.manual_seed(0)
    network = {**NETWORK, "dynamics": "hamiltonian", "reversible": True}
    module = Backprop(network, ADAM)
    trainer = fit(module, batches(3), log_every_n_steps=1)
    assert 0 <= trainer.callback_metrics["stage_0/drift"] < 1e-4
