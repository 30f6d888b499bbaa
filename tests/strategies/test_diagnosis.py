"""The quality of the gradients that stages use, against autograd through the whole network."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sglight.strategies.backprop import Backprop
from sglight.strategies.blend import Blend
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.local import Local
from sglight.strategies.multilevel import Multilevel
from tests.parallel.training import train_all, train_on
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches, fit

SGD = {"name": "sgd", "lr": 0.3, "momentum": 0.0}


class Curve:
    """Collects what is reported."""

    def __init__(self) -> None:
        self.points: dict[str, list[float]] = {}

    def __call__(self, step: int, values: Any) -> None:
        for name, value in values.items():
            self.points.setdefault(name, []).append(value)


def curves(module: Any, data: Any, **options: Any) -> dict[str, list[float]]:
    curve = Curve()
    module.curves.listeners.append(curve)
    fit(module, data, log_every_n_steps=1, **options)
    return curve.points


@pytest.mark.parametrize("network", [NETWORK, {**IMAGES, "normalisation": "batch"}], ids=["dense", "norms"])
def test_backpropagation_uses_what_is_exact(network: dict[str, Any]) -> None:
    for module in (
        Backprop(network, ADAM, diagnose_every_n_batches=1),
        Backprop(network, ADAM, stages=3, microbatches=4, diagnose_every_n_batches=1),
        Multilevel(network, ADAM, stages=3, levels=1, level={"mode": "exact"}, diagnose_every_n_batches=1),
        Delayed(network, ADAM, stages=1, microbatches=3, diagnose_every_n_batches=1),
    ):
        found = curves(module, batches(4, shape=network["shape"]))
        for i in range(module.plan.last + 1):
            assert found[f"stage_{i}/cosine"] == pytest.approx([1.0] * 4, abs=1e-6)
            assert found[f"stage_{i}/relative_error"] == [0.0] * 4
            assert found[f"stage_{i}/staleness"] == [0.0] * 4


def test_every_source_is_measured_at_every_boundary() -> None:
    data = batches(6)
    for module in (
        Backprop(NETWORK, ADAM, stages=3, microbatches=4, diagnose_every_n_batches=1),
        Blend(NETWORK, ADAM, stages=3, blend=1.0, diagnose_every_n_batches=1),
    ):
        found = curves(module, data)
        for i in range(2):
            assert found[f"boundary_{i}/cosine"] == pytest.approx([1.0] * 6, abs=1e-6)
            assert found[f"boundary_{i}/relative_error"] == [0.0] * 6
            assert found[f"boundary_{i}/norm_ratio"] == [1.0] * 6
    for module in (DNI(NETWORK, ADAM, stages=3, diagnose_every_n_batches=1), Local(NETWORK, ADAM, stages=3)):
        found = curves(module, data)
        for i in range(2):  # what is used is the estimate
            assert found[f"boundary_{i}/cosine"] == pytest.approx(found[f"estimator_{i}/cosine"], nan_ok=True)
    # Weights that hardly move: late gradients are right.
    still = Delayed(NETWORK, {**ADAM, "lr": 1e-9}, stages=3, microbatches=2, diagnose_every_n_batches=1)
    found = curves(still, data)
    for i in range(2):
        assert found[f"boundary_{i}/relative_error"] == pytest.approx(
            [0.0] * len(found[f"boundary_{i}/cosine"]), abs=1e-5
        )


class Watched(Delayed):
    """Computes by itself how far the gradient of an update is from autograd's, at the weights of the round's start."""

    def watch(self, data: Any) -> None:
        self.__dict__.update(data=data, count=dict.fromkeys(range(3), 0), errors={i: [] for i in range(3)})
        before_round = self.diagnosis.before_round

        def snapshot(runtime: Any, n: int) -> None:
            self.__dict__["weights"] = [p.detach().clone() for p in self.parameters()]
            before_round(runtime, n)

        self.diagnosis.before_round = snapshot  # type: ignore[method-assign]

    def step_stage(self, i: int) -> None:
        d = self.__dict__
        x, y = d["data"][d["count"][i]]
        d["count"][i] += 1
        stages = [deepcopy(stage) for _, stage in self.own_stages()]
        parameters = [p for stage in stages for p in stage.parameters()]
        h = x
        with torch.no_grad():
            for p, w in zip(parameters, d["weights"], strict=True):
                p.copy_(w)
        for stage in stages:
            h = stage(h)
        F.cross_entropy(h, y).backward()
        pairs = zip(self.stage(i).parameters(), stages[i].parameters(), strict=True)
        used, exact = (torch.cat([p.grad.flatten() for p in ps]) for ps in zip(*pairs, strict=True))  # type: ignore
        d["errors"][i].append(float((used - exact).norm() / exact.norm()))
        super().step_stage(i)


@pytest.mark.parametrize("m", [1, 2])
def test_late_gradients_are_measured_at_the_weights_before_the_update(m: int) -> None:
    data = batches(12)
    module = Watched(NETWORK, SGD, stages=3, microbatches=m, diagnose_every_n_batches=1)
    module.watch(data)
    found = curves(module, data)
    errors = module.__dict__["errors"]
    for i in range(3):
        measured = found[f"stage_{i}/relative_error"]
        assert measured
        # Stages are looked at in turn: each measured value is one of the sequence, in order.
        position = 0
        for value in measured:
            while errors[i][position] != pytest.approx(value, rel=1e-3, abs=1e-6):
                position += 1
    assert max(found["stage_0/relative_error"]) > 0.01
    if m == 1:  # a later piece of a batch comes from stages that have updated since the first
        assert found["stage_2/relative_error"] == pytest.approx(
            [0.0] * len(found["stage_2/staleness"]), abs=1e-6
        )
    assert set(found["stage_2/staleness"]) == {0.0}
    assert max(found["stage_0/staleness"]) == (2.0 if m == 1 else 1.0)


@pytest.mark.parametrize("kind", ["delayed", "replayed", "dni", "norms"])
def test_it_leaves_no_trace(kind: str) -> None:
    network = {**IMAGES, "normalisation": "batch"} if kind == "norms" else NETWORK
    states: list[dict[str, Tensor]] = []
    for every in (0, 1):
        options: dict[str, Any] = {"stages": 3, "diagnose_every_n_batches": every}
        if kind == "dni":
            module: Any = DNI(network, ADAM, **options)
        else:
            backward = "replayed" if kind == "replayed" else "stashed"
            module = Delayed(network, ADAM, microbatches=2, backward=backward, **options)
        fit(module, batches(6, shape=network["shape"]), log_every_n_steps=1)
        states.append(module.state_dict())
    assert_equal(*states)


@pytest.mark.parametrize("m", [1, 2])
def test_it_leaves_no_trace_while_a_long_pipeline_empties(m: int) -> None:
    data = [*batches(11), *batches(1, size=7)]
    states = []
    for every in (0, 1):
        module = Delayed(
            {**NETWORK, "steps": 8}, ADAM, stages=8, microbatches=m, diagnose_every_n_batches=every
        )
        fit(module, data, epochs=3, log_every_n_steps=1)
        states.append(module.state_dict())
    assert_equal(*states)


def test_workers_measure_what_one_process_measures() -> None:
    options = {"stages": 4, "microbatches": 2, "diagnose_every_n_batches": 2}
    jobs = [{"network": NETWORK, "options": options}]
    (alone,), (together,) = train_all(jobs), train_on(2, jobs)
    names = {name for name in alone.metrics[0] if name.startswith("stage_")}
    assert {f"stage_{i}/{kind}" for i in range(4) for kind in ("cosine", "staleness")} <= names
    for name in names:
        assert together.metrics[1][name] == pytest.approx(alone.metrics[0][name], rel=1e-6, abs=1e-9)
    assert_equal(together.parameters, alone.parameters)
