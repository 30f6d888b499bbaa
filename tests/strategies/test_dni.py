"""Synthetic gradients against a plain loop from the paper's equations, and with an oracle against backprop."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from sglight.errors import UserError
from sglight.gradients import Estimator, synthetic_gradient
from sglight.gradients.base import compare
from sglight.networks import NetworkSpec, Stage
from sglight.strategies.backprop import Backprop
from sglight.strategies.dni import DNI
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches, fit, whole

ESTIMATOR = {"name": "mlp", "hidden": [9], "optimizer": {"name": "adam", "lr": 3e-3}}


def dni(network: dict[str, Any] = NETWORK, **options: Any) -> DNI:
    return DNI(network, ADAM, **{"estimator": ESTIMATOR, "diagnose_every_n_batches": 1, **options})


def predict(sg: Any, h: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return sg(h, y)


def lesson(sg: Any, h: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    return (sg(h, y) - gradient).pow(2).sum() / len(y)


def classifiers_gradient(sg: Any, h: Tensor, y: Tensor) -> Tensor:
    """Czarnecki et al. 2017, section 4.3: the gradient of a classifier."""
    h = h.detach().requires_grad_()
    F.cross_entropy(sg.head.layers(h), y, reduction="sum").backward()
    assert h.grad is not None
    return h.grad


def both_losses(sg: Any, h: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """Its loss, and how far its gradient is from the true one."""
    h = h.detach().requires_grad_()
    loss = F.cross_entropy(sg.head.layers(h), y, reduction="sum")
    (own,) = torch.autograd.grad(loss, h, create_graph=True)
    return (loss + (own - gradient).pow(2).sum()) / len(y)


def reference(
    stages: list[Stage],
    estimators: list[Any],
    data: list[tuple[Tensor, Tensor]],
    lag: int,
    predict: Any = predict,
    lesson: Any = lesson,
) -> None:
    """Jaderberg et al. 2017, section 2, for M stages in turn; nothing of `sglight.strategies` is used."""
    last = len(stages) - 1
    stage_adam = [torch.optim.Adam(s.parameters(), lr=1e-2) for s in stages]
    sg_adam = [torch.optim.Adam(e.parameters(), lr=3e-3) for e in estimators]
    states: list[list[Tensor]] = []
    gradients: list[list[Tensor]] = []

    def learn(t: int) -> None:
        for i, sg in enumerate(estimators):
            y = data[t][1]
            error = lesson(sg, states[t][i], y, gradients[t][i])
            sg_adam[i].zero_grad()
            error.backward()
            sg_adam[i].step()

    for t, (x, y) in enumerate(data):
        states.append([])
        gradients.append([])
        h = x
        for i, stage in enumerate(stages):
            h = h.detach().requires_grad_(i > 0)
            out = stage(h)
            stage_adam[i].zero_grad()
            if i < last:
                out.backward(predict(estimators[i], out, y))
                states[t].append(out.detach())
            else:
                F.cross_entropy(out, y, reduction="sum").backward()
            for p in stage.parameters():
                p.grad *= 1 / len(y)
            stage_adam[i].step()
            if i > 0:
                gradients[t].append(h.grad)
            h = out
        if t >= lag:
            learn(t - lag)
    for t in range(max(len(data) - lag, 0), len(data)):
        learn(t)


@pytest.mark.parametrize("network", [NETWORK, IMAGES], ids=["dense", "conv"])
@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("stages", [2, 4])
def test_equals_the_plain_loop_bit_for_bit(stages: int, lag: int, network: dict[str, Any]) -> None:
    data = batches(10, shape=network["shape"])
    module = dni(network, stages=stages, lag=lag)
    spec = NetworkSpec(**network)
    cuts = module.cuts
    plain = [Stage(spec, a, b) for a, b in pairwise(cuts)]
    estimators = [
        synthetic_gradient("mlp", spec.state_shape(cut), 4, [9], True, 3, spec.seed, "estimators", cut)
        for cut in cuts[1:-1]
    ]
    reference(plain, estimators, data, lag)
    fit(module, data)
    for i, stage in enumerate(plain):
        assert_equal(dict(module.stage(i).named_parameters()), dict(stage.named_parameters()))
    for i, estimator in enumerate(estimators):
        assert_equal(dict(module.estimator(i).named_parameters()), dict(estimator.named_parameters()))


@pytest.mark.parametrize("network", [NETWORK, IMAGES], ids=["dense", "conv"])
@pytest.mark.parametrize("stages", [2, 4])
def test_sobolev_estimators_equal_the_plain_loop_bit_for_bit(stages: int, network: dict[str, Any]) -> None:
    data = batches(10, shape=network["shape"])
    name = "mlp" if network is NETWORK else "conv"
    module = dni(network, stages=stages, estimator={**ESTIMATOR, "name": name, "form": "sobolev"})
    spec, source = NetworkSpec(**network), module.plan.source
    plain = [Stage(spec, a, b) for a, b in pairwise(module.cuts)]
    estimators = [source.make_estimator(spec, module.cuts, i) for i in range(stages - 1)]
    reference(plain, estimators, data, 1, classifiers_gradient, both_losses)
    fit(module, data)
    for i, stage in enumerate(plain):
        assert_equal(dict(module.stage(i).named_parameters()), dict(stage.named_parameters()))
    for i, estimator in enumerate(estimators):
        assert_equal(dict(module.estimator(i).named_parameters()), dict(estimator.named_parameters()))


def test_forms_that_do_not_exist_or_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy\.estimator\.form=better is unknown; choose direct or"):
        dni(estimator={"name": "mlp", "form": "better"})
    with pytest.raises(
        ValueError, match=r"form=sobolev is for linear, mlp, conv, not tests\.x\.Y; leave it out"
    ):
        dni(estimator={"name": "tests.x.Y", "form": "sobolev"})
    with pytest.raises(ValueError, match=r"strategy\.estimator\.hidden=\[\] .*form=residual .*; give widths"):
        dni(estimator={"name": "conv", "hidden": [], "form": "residual"})
    module = dni(estimator={"name": "conv", "form": "sobolev"})
    with pytest.raises(ValueError, match=r"model\.kernel=conv"):
        module.plan.source.make_estimator(module.spec, module.cuts, 0)


def test_a_loss_without_second_derivatives_has_no_sobolev_estimators() -> None:
    loss = {"name": "torch.nn.MultiMarginLoss"}
    fit(dni(loss=loss), batches(2))
    with pytest.raises(
        UserError, match=r"form=sobolev needs a loss with second derivatives.*choose cross_entropy"
    ):
        fit(dni(loss=loss, estimator={**ESTIMATOR, "form": "sobolev"}), batches(2))


class Oracle(Estimator):
    """Knows the true gradient: runs the stages behind the boundary."""

    def __init__(self, module: DNI, i: int) -> None:
        super().__init__()
        # Hidden from nn.Module, whose child it is.
        self.__dict__["behind"] = (module, i)

    def estimate(self, state: Tensor, labels: Tensor, time: float) -> Tensor:
        module, i = self.__dict__["behind"]
        h = first = state.detach().requires_grad_()
        for j, stage in module.own_stages():
            h = stage(h) if j > i else h
        (gradient,) = torch.autograd.grad(F.cross_entropy(h, labels, reduction="sum"), first)
        return gradient

    def learn(self, state: Tensor, labels: Tensor, target: Tensor, time: float) -> Tensor:
        return torch.zeros(())


class OracleDNI(DNI):
    def make_estimator(self, i: int) -> Estimator:
        return Oracle(self, i)


@pytest.mark.parametrize("dynamics", ["euler", "antisymmetric", "hamiltonian", "leapfrog"])
@pytest.mark.parametrize("kernel", ["dense", "conv"])
@pytest.mark.parametrize("stages", [2, 3, 6])
def test_with_an_oracle_equals_backprop_bit_for_bit(dynamics: str, kernel: str, stages: int) -> None:
    network = {**(NETWORK if kernel == "dense" else IMAGES), "dynamics": dynamics}
    data = batches(8, shape=network["shape"])
    true, decoupled = Backprop(network, ADAM), OracleDNI(network, ADAM, stages=stages, lag=0)
    fit(true, data, epochs=2)
    fit(decoupled, data, epochs=2)
    assert_equal(whole(decoupled), whole(true))


def test_the_oracle_is_diagnosed_as_exact() -> None:
    module = OracleDNI(NETWORK, ADAM, stages=3, diagnose_every_n_batches=1)
    trainer = fit(module, batches(3), log_every_n_steps=1)
    for i in range(2):
        assert trainer.callback_metrics[f"estimator_{i}/cosine"] == pytest.approx(1, abs=1e-5)
        assert trainer.callback_metrics[f"estimator_{i}/relative_error"] == 0


def test_diagnosis_leaves_no_trace() -> None:
    network = {**IMAGES, "normalisation": "batch"}
    data = batches(6, shape=(1, 6, 6))
    states = []
    for every in (0, 1):
        module = dni(network, diagnose_every_n_batches=every)
        fit(module, data, log_every_n_steps=1)
        states.append(module.state_dict())
    assert_equal(*states)


def test_before_it_has_learnt_an_estimator_leaves_the_stage_alone() -> None:
    module = dni(stages=2, lag=20)
    before = whole(dni_built(module))
    fit(module, batches(1))
    after = whole(module)
    # One batch, drained after the update: stage 0 got the zero gradient, stage 1 the true one.
    cut = module.cuts[1]
    assert torch.equal(before["opening.weight"], after["opening.weight"])
    assert torch.equal(before["segments.0.weight"][:cut], after["segments.0.weight"][:cut])
    assert not torch.equal(before["segments.0.weight"][cut:], after["segments.0.weight"][cut:])


def dni_built(module: DNI) -> DNI:
    module.configure_model()
    return module


def test_lag_is_part_of_the_algorithm_and_the_epoch_drains_it() -> None:
    data = batches(5)
    runs = {lag: dni(lag=lag) for lag in (0, 1, 3, 50)}
    for module in runs.values():
        fit(module, data, epochs=2)
        assert not any(module.runtime.window.values())
    weights = {lag: whole(module)["segments.0.weight"] for lag, module in runs.items()}
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[3])
    # A lag beyond the epoch's length is that of learning at its end only.
    assert not torch.equal(weights[3], weights[50])


def test_global_step_counts_batches_not_optimiser_steps() -> None:
    trainer = fit(dni(stages=4), batches(7), epochs=2)
    assert trainer.global_step == 14


def test_an_estimator_learns_only_every_nth_batch() -> None:
    module = dni(estimator={**ESTIMATOR, "every_n_batches": 3}, lag=1)
    trainer = fit(module, batches(7))
    steps = next(iter(trainer.optimizers[-1].state.values()))["step"]
    assert int(steps) == 3  # batches 0, 3 and 6


def test_more_stages_than_steps_is_refused_with_the_keys() -> None:
    with pytest.raises(ValueError, match=r"strategy\.stages=7 .*model\.steps"):
        dni(stages=7)


def test_negative_lag_is_refused() -> None:
    with pytest.raises(ValueError, match=r"strategy\.lag=-1"):
        dni(lag=-1)


def test_every_step_can_be_a_stage() -> None:
    module = dni(stages=6)
    fit(module, batches(2))
    assert list(module.cuts) == list(range(7))


def test_resuming_between_epochs_ends_bit_identical(tmp_path: Path) -> None:
    data = batches(5)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    scheduler = {"name": "cosine", "warmup_epochs": 1, "min_factor": 0.1}
    straight = dni(lag=2, scheduler=scheduler)
    fit(straight, data, epochs=3, callbacks=[saver], enable_checkpointing=True)
    resumed = dni(lag=2, scheduler=scheduler)
    fit(resumed, data, epochs=3, ckpt=str(tmp_path / "epoch=0.ckpt"))
    assert_equal(resumed.state_dict(), straight.state_dict())


def test_a_checkpoint_in_mid_epoch_keeps_what_waits(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    module = dni(lag=2)
    fit(module, batches(5), callbacks=[saver], enable_checkpointing=True)
    in_flight = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["in_flight"]
    assert set(in_flight) == {"stage_0", "means"}
    assert len(in_flight["stage_0"]["passages"]) == 2
    again = dni_built(dni(lag=2))
    again.on_load_checkpoint(torch.load(tmp_path / "step=3.ckpt", weights_only=True))
    assert [passage.batch for passage in again.runtime.window[0]] == [1, 2]
    assert all(passage.target is not None for passage in again.runtime.window[0])


def test_speedup_and_estimator_metrics_are_logged() -> None:
    trainer = fit(dni(stages=3), batches(12), log_every_n_steps=2)
    names = trainer.callback_metrics
    assert {
        "train/loss",
        "train/acc",
        "speedup/theoretical",
        "estimator_0/loss",
        "estimator_1/cosine",
    } <= set(names)
    assert 1 <= float(names["speedup/theoretical"]) <= 3


def test_bf16_learns_close_to_float32() -> None:
    data = batches(6)
    runs = [dni(), dni()]
    for module, precision in zip(runs, ("32-true", "bf16-mixed"), strict=True):
        fit(module, data, precision=precision)
    for a, b in zip(whole(runs[0]).values(), whole(runs[1]).values(), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).abs().max() < 0.05


def test_compare_knows_direction_and_length() -> None:
    true = torch.randn(6, 2, 3)
    same = compare(2 * true, true)
    assert same["cosine"] == pytest.approx(1, abs=1e-5)
    assert same["relative_error"] == pytest.approx(1, abs=1e-5)
    assert same["norm_ratio"] == pytest.approx(2, abs=1e-5)
    assert same["sign_agreement"] == 1
    opposite = compare(-true, true)
    assert opposite["cosine"] == pytest.approx(-1, abs=1e-5)
    assert opposite["sign_agreement"] == 0
    half = true * torch.tensor([[1.0], [-3.0]])
    assert compare(half, true)["sign_agreement"] == pytest.approx(0.5)
