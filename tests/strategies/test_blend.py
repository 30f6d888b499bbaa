"""Blends: plain loops bit for bit, their limits, true gradients that come down, trainings that go on."""

from __future__ import annotations

from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from sglight.gradients import Estimator, Ramp
from sglight.networks import Stage
from sglight.strategies.backprop import Backprop
from sglight.strategies.blend import Blend
from sglight.strategies.dni import DNI
from sglight.strategies.local import Local
from sglight.strategies.staged import StagedModule
from tests.parallel.training import Job, train
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches, fit, whole
from tests.strategies.test_dni import ESTIMATOR, Oracle

HEAD = {"name": "mlp", "hidden": [9], "optimizer": {"name": "adam", "lr": 3e-3}}
Data = list[tuple[Tensor, Tensor]]


def blend(network: dict[str, Any] = NETWORK, **options: Any) -> Blend:
    return Blend(
        network, ADAM, **{"estimator": ESTIMATOR, "head": HEAD, "diagnose_every_n_batches": 1, **options}
    )


class Plain:
    """Stages, and heads or estimators, as a module begins with them; nothing of `sglight.strategies` trains them."""

    def __init__(self, module: Blend) -> None:
        spec, cuts = module.spec, module.cuts
        self.stages = [Stage(spec, a, b) for a, b in pairwise(cuts)]
        self.last = len(self.stages) - 1
        self.estimators: list[Any] = [
            module.plan.source.make_estimator(spec, cuts, i) for i in range(self.last)
        ]
        self.adam = [torch.optim.Adam(s.parameters(), lr=1e-2) for s in self.stages]
        self.own_adam = [torch.optim.Adam(e.parameters(), lr=3e-3) for e in self.estimators]

    def own(self, i: int, state: Tensor, y: Tensor, learns: bool) -> Tensor:
        """The gradient that the head (which learns) or the estimator after stage i predicts."""
        if not learns:
            with torch.no_grad():
                return self.estimators[i](state, y)
        state = state.detach().requires_grad_()
        F.cross_entropy(self.estimators[i](state), y, reduction="sum").backward()
        self.step(self.estimators[i], self.own_adam[i], len(y))
        assert state.grad is not None
        return state.grad

    def teach(self, i: int, state: Tensor, y: Tensor, target: Tensor) -> None:
        self.own_adam[i].zero_grad()
        ((self.estimators[i](state, y) - target).square().sum() / len(y)).backward()
        self.own_adam[i].step()

    @staticmethod
    def step(part: Any, optimizer: Any, samples: int) -> None:
        for p in part.parameters():
            p.grad *= 1 / samples
        optimizer.step()
        optimizer.zero_grad()

    def assert_same(self, module: Blend) -> None:
        for i, stage in enumerate(self.stages):
            assert_equal(dict(module.stage(i).named_parameters()), dict(stage.named_parameters()))
        for i, each in enumerate(self.estimators):
            assert_equal(dict(module.estimator(i).named_parameters()), dict(each.named_parameters()))


def waiting(plain: Plain, data: Data, weight: float, heads: bool) -> None:
    """g_i = b J_{i+1}^T g_{i+1} + (1 - b) d_i; estimators learn from J_{i+1}^T g_{i+1} before the next batch's d_i."""
    lessons: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for x, y in data:
        inputs, outputs = [], []
        for i, stage in enumerate(plain.stages):
            inputs.append((x if i == 0 else outputs[-1]).detach().requires_grad_(i > 0))
            outputs.append(stage(inputs[-1]))
        for lesson in lessons:
            plain.teach(*lesson)
        lessons = []
        for i in reversed(range(plain.last + 1)):
            if i == plain.last:
                F.cross_entropy(outputs[i], y, reduction="sum").backward()
                continue
            true, state = inputs[i + 1].grad, outputs[i].detach()
            assert true is not None
            outputs[i].backward(weight * true + (1 - weight) * plain.own(i, state, y, heads))
            if not heads:
                lessons.append((i, state, y, true))
        for stage, adam in zip(plain.stages, plain.adam, strict=True):
            plain.step(stage, adam, len(y))
    for lesson in lessons:
        plain.teach(*lesson)


def arriving(plain: Plain, data: Data, weight: float, heads: bool) -> None:
    """At once (1 - b) d_i; b t_i of batch n - d_i with it, through the weights of then; t_i = J_{i+1}^T t_{i+1}."""
    trues: dict[tuple[int, int], Tensor] = {}
    kept: dict[tuple[int, int], tuple[Stage, Tensor, Tensor]] = {}

    def arrive(i: int, n: int, draining: bool) -> None:
        piece = n - (plain.last - i)
        if i == plain.last or not 0 <= piece < len(data):
            return
        then, entered, output = kept.pop((i, piece))
        then.zero_grad()
        entered.grad = None
        true = trues[i, piece]
        output.backward(true)
        if i > 0:
            assert entered.grad is not None
            trues[i - 1, piece] = entered.grad
        for p, q in zip(plain.stages[i].parameters(), then.parameters(), strict=True):
            if not draining and weight and q.grad is not None:
                p.grad = p.grad + weight * q.grad

    def learn(i: int, n: int) -> None:
        piece = n - (plain.last - i)
        if i < plain.last and not heads and 0 <= piece < len(data):
            plain.teach(i, states[i, piece], data[piece][1], trues[i, piece])

    states: dict[tuple[int, int], Tensor] = {}
    for n, (x, y) in enumerate(data):
        h = x
        for i, stage in enumerate(plain.stages):
            then = deepcopy(stage)
            entered = h.detach().requires_grad_(i > 0)
            output = then(entered)
            h = states[i, n] = output.detach()
            if i == plain.last:
                F.cross_entropy(output, y, reduction="sum").backward()
                assert entered.grad is not None
                trues[i - 1, n] = entered.grad
            else:
                output.backward((1 - weight) * plain.own(i, h, y, heads), retain_graph=True)
                kept[i, n] = then, entered, output
            for p, q in zip(stage.parameters(), then.parameters(), strict=True):
                p.grad = q.grad
            arrive(i, n, draining=False)
            plain.step(stage, plain.adam[i], len(y))
            learn(i, n)
    for n in range(len(data), len(data) + plain.last):
        for i in range(plain.last):
            arrive(i, n, draining=True)
            learn(i, n)


@pytest.mark.parametrize("network", [NETWORK, IMAGES], ids=["dense", "conv"])
@pytest.mark.parametrize("source", ["local", "synthetic"])
@pytest.mark.parametrize("loop", [waiting, arriving])
@pytest.mark.parametrize("stages", [2, 4])
def test_equals_the_plain_loop_bit_for_bit(
    stages: int, loop: Any, source: str, network: dict[str, Any]
) -> None:
    data = batches(7, shape=network["shape"])
    arrival = "wait" if loop is waiting else "late"
    module = blend(network, stages=stages, source=source, blend=0.3, arrival=arrival)
    plain = Plain(module)
    loop(plain, data, 0.3, source == "local")
    fit(module, data)
    plain.assert_same(module)


LIMITS: dict[str, tuple[dict[str, Any], type[StagedModule], dict[str, Any]]] = {
    "all true, heads": ({"blend": 1.0}, Backprop, {"stages": 1}),
    "all true, estimators": ({"blend": 1.0, "source": "synthetic"}, Backprop, {"stages": 1}),
    "heads alone": ({"blend": 0.0}, Local, {"head": HEAD}),
    "heads alone, late": ({"blend": 0.0, "arrival": "late"}, Local, {"head": HEAD}),
    "estimators alone": ({"blend": 0.0, "source": "synthetic"}, DNI, {"lag": 0, "estimator": ESTIMATOR}),
}


@pytest.mark.parametrize("dynamics", ["euler", "antisymmetric", "hamiltonian", "leapfrog"])
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_are_the_pure_methods(limit: str, dynamics: str) -> None:
    options, kind, pure = LIMITS[limit]
    network, data = {**IMAGES, "dynamics": dynamics}, batches(5, shape=(1, 6, 6))
    mixed, alone = blend(network, **{"stages": 3, **options}), kind(network, ADAM, **{"stages": 3, **pure})
    fit(mixed, data, epochs=2)
    fit(alone, data, epochs=2)
    assert_equal(whole(mixed), whole(alone))


class OracleBlend(Blend):
    def make_estimator(self, i: int) -> Estimator:
        return Oracle(self, i)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_with_an_oracle_any_blend_is_backpropagation(weight: float) -> None:
    data = batches(6)
    true, mixed = (
        Backprop(NETWORK, ADAM),
        OracleBlend(NETWORK, ADAM, stages=3, source="synthetic", blend=weight),
    )
    fit(true, data)
    fit(mixed, data)
    assert_equal(whole(mixed), whole(true))


class Listener(Estimator):
    """Says nothing, and keeps what it is taught."""

    def __init__(self, taught: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.taught = taught

    def estimate(self, state: Tensor, labels: Tensor, time: float) -> Tensor:
        return torch.zeros_like(state)

    def learn(self, state: Tensor, labels: Tensor, target: Tensor, time: float) -> Tensor:
        self.taught.append((state, labels, target))
        return torch.zeros(())


def test_what_arrives_is_the_true_gradient_not_a_bootstrapped_one() -> None:
    taught: list[list[tuple[Tensor, Tensor, Tensor]]] = [[], [], []]

    class Listening(Blend):
        def make_estimator(self, i: int) -> Estimator:
            return Listener(taught[i])

    still = {"name": "sgd", "lr": 1e-9, "momentum": 0.0}
    module = Listening(NETWORK, still, stages=4, source="synthetic", blend=0.0, arrival="late")
    fit(module, batches(6))
    for i, lessons in enumerate(taught):
        assert len(lessons) == 6
        for state, labels, target in lessons:
            h = state = state.detach().requires_grad_()
            for j in range(i + 1, 4):
                h = module.stage(j)(h)
            F.cross_entropy(h, labels, reduction="sum").backward()
            assert state.grad is not None
            torch.testing.assert_close(target, state.grad, rtol=1e-4, atol=1e-6)


def test_the_weight_moves_on_a_line_and_stays() -> None:
    ramp = Ramp(1.0, 0.2, 8)
    assert [ramp.at(n) for n in (0, 4, 8, 20)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    module = blend(blend=1.0, blend_last=0.0, blend_epochs=2)
    fit(module, batches(5), epochs=3)
    assert module.plan.source.weight.batches == 10
    true, warm = Backprop(NETWORK, ADAM), blend(blend=1.0, blend_last=0.0, blend_epochs=1e6)
    fit(true, batches(3))
    fit(warm, batches(3))  # hardly moved yet
    for name, value in whole(true).items():
        torch.testing.assert_close(whole(warm)[name], value, rtol=1e-3, atol=1e-4)


def test_a_ramp_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy\.blend_last needs to know.*max_epochs"):
        fit(blend(blend_last=0.0), batches(2), epochs=-1, max_steps=3)


@pytest.mark.parametrize("source", ["local", "synthetic"])
@pytest.mark.parametrize("arrival", ["wait", "late"])
def test_resuming_ends_bit_identical(arrival: str, source: str, tmp_path: Path) -> None:
    data = batches(5)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"stages": 3, "arrival": arrival, "source": source, "blend_last": 0.1}
    straight, resumed = blend(**options), blend(**options)
    fit(straight, data, epochs=3, callbacks=[saver], enable_checkpointing=True)
    fit(resumed, data, epochs=3, ckpt=str(tmp_path / "epoch=0.ckpt"))
    assert_equal(resumed.state_dict(), straight.state_dict())


@pytest.mark.parametrize("source", ["local", "synthetic"])
def test_resuming_in_mid_epoch_takes_up_what_has_not_arrived(source: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"stages": 4, "arrival": "late", "source": source, "estimator": ESTIMATOR}
    job: Job = {"network": NETWORK, "kind": Blend, "options": {**options, "blend_last": 0.1}}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    straight = train({**job, "callbacks": [saver]})
    resumed = train({**job, "ckpt": str(tmp_path / "step=5.ckpt")})
    assert_equal(resumed.parameters, straight.parameters)


def test_the_ideal_speedup_counts_the_second_backward_pass() -> None:
    module = blend({**NETWORK, "steps": 8, "opening": "pad"}, stages=4, arrival="late")
    text = module.schedule(4)
    assert "A: a second backward pass" in text and " A0" in text
    assert 2 < float(text.rpartition(": ")[2].split()[0]) < 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "true"}, r"strategy\.source=true is unknown; choose local or synthetic"),
        ({"arrival": "soon"}, r"strategy\.arrival=soon is unknown"),
        ({"blend": 1.5}, r"strategy\.blend=1\.5 is not allowed"),
        ({"blend_last": -0.5}, r"strategy\.blend_last=-0\.5"),
    ],
)
def test_what_is_wrong_is_refused_by_its_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blend(**options)
