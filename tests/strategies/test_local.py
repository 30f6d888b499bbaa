"""Local losses: the papers' loop anew, bit for bit; nothing comes back through a boundary; trainings that go on."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

from sglight.gradients import Head
from sglight.networks import Stage
from sglight.strategies.backprop import Backprop
from sglight.strategies.local import Local
from sglight.strategies.loss import Loss
from sglight.strategies.multilevel import Multilevel
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches, fit, whole

HEADS: dict[str, dict[str, Any]] = {
    "linear": {"name": "linear"},
    "mlp": {"name": "mlp", "hidden": [9]},
    "predsim": {"name": "linear", "loss": "predsim", "similarity": 0.9},
    "conv": {"name": "conv", "hidden": [7, 5], "pool": 3},
}
DYNAMICS = ("euler", "antisymmetric", "hamiltonian", "leapfrog")


def local(network: dict[str, Any] = NETWORK, head: str = "mlp", **options: Any) -> Local:
    settings = {**HEADS[head], "optimizer": {"name": "adam", "lr": 3e-3}}
    return Local(network, ADAM, head=settings, **{"diagnose_every_n_batches": 1, **options})


def reference(stages: list[Stage], heads: list[Head], data: list[tuple[Tensor, Tensor]]) -> None:
    """Belilovsky et al. 2020, algorithm 1, and Nøkland & Eidnes 2019, equations 1 to 3, by plain autograd."""
    stage_adam = [torch.optim.Adam(s.parameters(), lr=1e-2) for s in stages]
    head_adam = [torch.optim.Adam(h.parameters(), lr=3e-3) for h in heads]
    for x, y in data:
        h = x
        for i, stage in enumerate(stages):
            h = stage(h.detach())
            if i == len(heads):
                F.cross_entropy(h, y, reduction="sum").backward()
            else:
                own_loss(heads[i], h, y).backward()
                for p in heads[i].parameters():
                    p.grad *= 1 / len(y)
                head_adam[i].step()
                head_adam[i].zero_grad()
            for p in stage.parameters():
                p.grad *= 1 / len(y)
            stage_adam[i].step()
            stage_adam[i].zero_grad()


def own_loss(head: Head, state: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(head.layers(state), y, reduction="sum")
    if head.matched is None:
        return loss
    features = head.matched(state)
    if features.ndim == 4:
        features = (features.flatten(2).var(2, correction=0) + 1e-8).sqrt()
    between = [
        F.cosine_similarity(a[:, None], a[None], dim=2)
        for a in (v - v.mean(1, keepdim=True) for v in (features, F.one_hot(y, 4).float()))
    ]
    return 0.1 * loss + 0.9 * len(y) * (between[0] - between[1]).square().mean()


def plain(module: Local) -> tuple[list[Stage], list[Head]]:
    """Stages and heads as the module begins with them."""
    spec = module.spec
    stages = [Stage(spec, a, b) for a, b in pairwise(module.cuts)]
    return stages, [module.plan.source.make_estimator(spec, module.cuts, i) for i in range(len(stages) - 1)]


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize(
    ("network", "head", "dynamics"),
    [
        *((NETWORK, "mlp", dynamics) for dynamics in DYNAMICS),
        (NETWORK, "linear", "hamiltonian"),
        *((IMAGES, "conv", dynamics) for dynamics in DYNAMICS),
        (IMAGES, "mlp", "euler"),
    ],
)
def test_equals_the_plain_loop_bit_for_bit(
    stages: int, network: dict[str, Any], head: str, dynamics: str
) -> None:
    network, data = {**network, "dynamics": dynamics}, batches(6, shape=network["shape"])
    module = local(network, head, stages=stages)
    expected, heads = plain(module)
    reference(expected, heads, data)
    fit(module, data)
    for i, stage in enumerate(expected):
        assert_equal(dict(module.stage(i).named_parameters()), dict(stage.named_parameters()))
    for i, each in enumerate(heads):
        assert_equal(dict(module.estimator(i).named_parameters()), dict(each.named_parameters()))


@pytest.mark.parametrize("network", [NETWORK, IMAGES], ids=["dense", "conv"])
def test_similarities_are_matched_as_the_plain_loop_does(network: dict[str, Any]) -> None:
    data = batches(4, shape=network["shape"])
    module = local(network, "predsim", stages=3)
    expected, heads = plain(module)
    reference(expected, heads, data)  # cosines by another formula: to rounding
    fit(module, data)
    for i, stage in enumerate(expected):
        for name, value in stage.named_parameters():
            torch.testing.assert_close(module.stage(i).get_parameter(name), value, rtol=1e-3, atol=2e-4)


def test_one_stage_is_backpropagation() -> None:
    data = batches(5)
    alone, true = local(stages=1), Backprop(NETWORK, ADAM)
    fit(alone, data)
    fit(true, data)
    assert_equal(whole(alone), whole(true))


def test_nothing_comes_back_through_a_boundary() -> None:
    # Whatever is behind the first boundary, the first stage and its head learn the same.
    found = []
    for cuts in ([2], [2, 4]):
        module = local(stages=len(cuts) + 1, cuts=cuts)
        fit(module, batches(6))
        parts = (module.stage(0), module.estimator(0))
        found.append({f"{k}.{n}": p for k, part in enumerate(parts) for n, p in part.named_parameters()})
    assert_equal(*found)
    assert not torch.equal(found[0]["0.segments.0.weight"], Stage(module.spec, 0, 2).segments["0"].weight)


def test_a_diagnosis_leaves_no_trace() -> None:
    states = []
    for every in (0, 1):
        module = local({**IMAGES, "normalisation": "batch"}, "conv", diagnose_every_n_batches=every)
        fit(module, batches(5, shape=(1, 6, 6)), log_every_n_steps=1)
        states.append(module.state_dict())
    assert_equal(*states)


def test_losses_and_quality_of_heads_and_stages_are_logged() -> None:
    known = fit(local(stages=3), batches(12), log_every_n_steps=2).callback_metrics
    assert {"estimator_0/loss", "estimator_1/cosine", "stage_0/cosine", "speedup/theoretical"} <= set(known)
    assert float(known["estimator_0/loss"]) == pytest.approx(1.386, abs=0.3)  # log 4, of noise


def test_the_ensemble_is_the_mean_of_all_logits() -> None:
    data = batches(4)
    module = local(stages=3, ensemble=True)
    trainer = fit(module, data, epochs=3)
    (metrics,) = trainer.validate(module, torch.utils.data.DataLoader(data, batch_size=None), verbose=False)
    losses, right = 0.0, 0
    with torch.no_grad():
        for x, y in data:
            h, logits = x, []
            for i in range(3):
                h = module.stage(i)(h)
                logits.append(module.estimator(i)(h) if i < 2 else h)
            mean = torch.stack(logits).sum(0) / 3
            losses += float(F.cross_entropy(mean, y, reduction="sum"))
            right += int((mean.argmax(1) == y).sum())
    assert metrics["val/ensemble_acc"] == pytest.approx(right / 48)
    assert metrics["val/ensemble_loss"] == pytest.approx(losses / 48, rel=1e-5)
    assert metrics["val/acc"] == pytest.approx(
        sum(int((module(x).argmax(1) == y).sum()) for x, y in data) / 48
    )


def test_resuming_ends_bit_identical(tmp_path: Path) -> None:
    data = batches(5)
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    scheduler = {"name": "cosine", "warmup_epochs": 1, "min_factor": 0.1}
    straight = local(stages=3, scheduler=scheduler)
    fit(straight, data, epochs=3, callbacks=[saver], enable_checkpointing=True)
    resumed = local(stages=3, scheduler=scheduler)
    fit(resumed, data, epochs=3, ckpt=str(tmp_path / "epoch=0.ckpt"))
    assert_equal(resumed.state_dict(), straight.state_dict())


def test_a_level_of_a_multilevel_training_continues_its_heads() -> None:
    options: dict[str, Any] = {"stages": 2, "levels": 2, "head": {"name": "linear"}}
    deep = {**NETWORK, "steps": 8}
    data = batches(5)
    trained = []
    for mode in ("local", ["exact", "local"]):
        module = Multilevel(deep, ADAM, level={"mode": mode}, **options)
        fit(module, data, epochs=2)
        trained.append(module.state_dict())
        assert module.spec.total_steps == 8
        assert module.estimator(0).layers[-1].weight.any()
    assert not torch.equal(trained[0]["stages.0.segments.0.weight"], trained[1]["stages.0.segments.0.weight"])


def test_levels_cannot_have_estimators_of_two_kinds() -> None:
    with pytest.raises(ValueError, match=r"strategy\.level\.mode=\['local', 'dni'\].*not both"):
        Multilevel(NETWORK, ADAM, levels=2, level={"mode": ["local", "dni"]})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "conv on vectors": ({"name": "conv"}, r"strategy\.head\.name=conv needs a convolutional network"),
    "no such head": ({"name": "rnn"}, r"strategy\.head\.name=rnn is unknown"),
    "no such key": ({"nam": "mlp"}, r"strategy\.head\.nam is unknown; did you mean name"),
    "nothing to convolve with": ({"name": "conv", "hidden": []}, r"strategy\.head\.hidden=\[\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_by_its_key(case: str) -> None:
    settings, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        Local(NETWORK, ADAM, head=settings)


def test_the_loss_of_the_network_is_that_of_heads() -> None:
    smooth = {"label_smoothing": 0.2}
    module = local(loss=smooth)
    module.configure_model()
    y, state = torch.arange(12) % 4, torch.randn(12, *module.spec.state_shape(2))
    expected = Loss(**smooth).total(module.estimator(0)(state), y)
    assert torch.equal(module.estimator(0).loss(state, y), expected)
