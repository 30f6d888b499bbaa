"""Parallel variable distribution of whole networks: what never increases, what equals what, when it ends."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch.utils.data import DataLoader

from sglight.errors import UserError
from sglight.networks.dynamics import DYNAMICS
from sglight.strategies.backprop import Backprop
from sglight.strategies.pvd import PVD
from sglight.strategies.pvd.objective import flat
from sglight.strategies.pvd.synchronisation import SYNCHRONISATIONS
from tests.strategies.common import ADAM, IMAGES, NETWORK, batches, fit, whole
from tests.strategies.pvd.common import iterate

SEGMENTS = {"channels": [4, 6], "steps": [3, 2], "shape": (1, 8, 8), "normalisation": "group", "groups": 2}
# Takes too large steps now and then, so that candidates are refused.
BOLD = {"name": "adam", "lr": 0.1}


def settings() -> list[Any]:
    """Every dynamics with every synchronisation, and on images in several segments."""
    dense = [(NETWORK, dynamics, rule) for dynamics, rule in product(DYNAMICS, SYNCHRONISATIONS)]
    conv = [({**IMAGES, **SEGMENTS}, dynamics, "affine") for dynamics in DYNAMICS]
    return [
        pytest.param({**network, "dynamics": d}, rule, id=f"{d}-{network.get('kernel', 'dense')}-{rule}")
        for network, d, rule in dense + conv
    ]


@pytest.mark.parametrize(("network", "rule"), settings())
def test_the_objective_never_increases(network: dict[str, Any], rule: str) -> None:
    data = batches(3, shape=network["shape"])
    module = PVD(network, BOLD, processors=3, synchronisation=rule, regularisation={"smoothness": 0.01})
    reports = iterate(module, data, epochs=3)[0].reports
    values = [reports[0]["pvd/objective_before"], *(report["pvd/objective_after"] for report in reports)]
    for report, before, after in zip(reports, values, values[1:], strict=False):
        found = [report[f"pvd/candidate_{i}"] for i in range(3)]
        assert after <= before == report["pvd/objective_before"]
        assert max(found) <= before
        assert report["pvd/winner"] == found.index(min(found))
        if rule != "average":
            assert after <= min(found)
    assert values[-1] < values[0]


def test_the_objective_is_the_mean_loss_of_the_network_that_is_left() -> None:
    data = batches(3)
    module = PVD(NETWORK, ADAM, processors=2)
    watch, _ = iterate(module, data, epochs=2)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    module.requires_grad_(False)
    assert watch.reports[-1]["pvd/objective_after"] == pytest.approx(
        float(F.cross_entropy(module(x), y)), rel=1e-6
    )
    assert watch.reports[-1]["pvd/accuracy"] == pytest.approx(
        float((module(x).argmax(1) == y).float().mean())
    )


def test_one_processor_with_the_best_candidate_is_backpropagation() -> None:
    data = batches(5)
    options = {"regularisation": {"smoothness": 0.01}, "clip_norm": 0.5}
    single = PVD(NETWORK, ADAM, processors=1, synchronisation="best", **options)
    plain = Backprop(NETWORK, ADAM, **options)
    watch, _ = iterate(single, data, epochs=3)
    fit(plain, data, epochs=3)
    assert all(report["pvd/objective_after"] < report["pvd/objective_before"] for report in watch.reports)
    for name, value in whole(plain).items():
        torch.testing.assert_close(whole(single)[name], value, rtol=1e-4, atol=1e-5)


def test_every_processor_that_overshoots_returns_its_start() -> None:
    module = PVD(NETWORK, {"name": "sgd", "lr": 1e4, "momentum": 0.0}, processors=2)
    watch, _ = iterate(module, batches(2), epochs=2)
    assert torch.equal(watch.points[0], watch.points[1])
    for report in watch.reports:
        assert report["pvd/candidate_0"] == report["pvd/candidate_1"] == report["pvd/objective_before"]
        assert report["pvd/scalar_0_1"] == report["pvd/scalar_1_0"] == 0


@pytest.mark.parametrize(
    ("name", "rate", "processors"), [("sgd", 1e4, 2), ("adam", 1e3, 2), ("adam", 1e30, 1)]
)
def test_a_processor_that_overshot_goes_on_once_the_rate_is_right(
    name: str, rate: float, processors: int
) -> None:
    optimizer = {"name": name, "lr": rate, "momentum": 0.9}
    # The second epoch's rate is 1e-2.
    scheduler = {"name": "step", "step_epochs": 1, "gamma": 1e-2 / rate}
    module = PVD(
        {**NETWORK, "activation": "relu", "dynamics": "euler"},
        optimizer,
        scheduler=scheduler,
        processors=processors,
    )
    refused, accepted = iterate(module, batches(4), epochs=2)[0].reports
    for i in range(processors):
        assert refused[f"pvd/candidate_{i}"] == refused["pvd/objective_before"]
        assert accepted[f"pvd/candidate_{i}"] < accepted["pvd/objective_before"]


def test_directions_are_of_the_size_of_the_solvers_steps() -> None:
    assert PVD(NETWORK, ADAM).directions.kind == "rms"
    sgd = PVD(NETWORK, {"name": "sgd", "lr": 0.05, "momentum": 0.9}, processors=2)
    assert sgd.directions.kind == "normalised"
    assert PVD(NETWORK, ADAM, local_solver="lbfgs").directions.kind == "normalised"
    assert PVD(NETWORK, ADAM, directions="gradient").directions.kind == "gradient"
    report = iterate(sgd, batches(4), epochs=1)[0].reports[0]
    assert max(report["pvd/candidate_0"], report["pvd/candidate_1"]) < report["pvd/objective_before"]


def test_l_bfgs_on_full_batches_goes_further_than_one_gradient_step() -> None:
    data = batches(1, size=40)
    options = {"processors": 2, "directions": "normalised", "synchronisation": "best"}
    quick = PVD(NETWORK, ADAM, local_solver="lbfgs", local_steps=8, **options)
    slow = PVD(NETWORK, ADAM, **options)
    reached = [
        iterate(module, data, epochs=3)[0].reports[-1]["pvd/objective_after"] for module in (quick, slow)
    ]
    assert reached[0] < reached[1]


def test_local_steps_are_taken_on_each_batch() -> None:
    data = batches(2)
    # A batch that comes three times in a row gives three steps.
    threefold = [batch for batch in data for _ in range(3)]
    options = {"processors": 2, "synchronisation": "best"}
    modules = [PVD(NETWORK, ADAM, local_steps=3, **options), PVD(NETWORK, ADAM, **options)]
    watches = [
        iterate(module, batch, epochs=1) for module, batch in zip(modules, (data, threefold), strict=True)
    ]
    torch.testing.assert_close(watches[0][0].points[0], watches[1][0].points[0], rtol=1e-4, atol=1e-5)
    assert [trainer.global_step for _, trainer in watches] == [2, 6]


@pytest.mark.parametrize("remember", [True, False])
def test_forget_me_not_moves_the_foreign_blocks_along_the_negative_gradient(remember: bool) -> None:
    module = PVD(NETWORK, ADAM, processors=3, forget_me_not=remember, directions="gradient")
    report = iterate(module, batches(4), epochs=1)[0].reports[0]
    scalars = [value for name, value in report.items() if name.startswith("pvd/scalar")]
    assert len(scalars) == (6 if remember else 0)
    assert all(m > 0 for m in scalars)


def test_evaluations_are_counted_in_passes_through_the_training_set() -> None:
    reports = iterate(PVD(NETWORK, ADAM, processors=3, synchronisation="best"), batches(4), epochs=2)[
        0
    ].reports
    # For the directions one, and one a processor; values of each candidate, and of the very first point.
    assert [report["pvd/gradient_evaluations"] for report in reports] == [4, 8]
    assert [report["pvd/function_evaluations"] for report in reports] == [1 + 3, 1 + 3 + 3]
    assert all(1 < report["speedup/theoretical"] <= 3 for report in reports)


def test_weight_decay_belongs_to_the_objective() -> None:
    decayed = {**ADAM, "weight_decay": 0.5}
    watch, _ = iterate(PVD(NETWORK, decayed, processors=2), batches(3), epochs=1)
    free, _ = iterate(PVD(NETWORK, ADAM, processors=2), batches(3), epochs=1)
    module = PVD(NETWORK, ADAM)
    module.configure_model()
    norm = float(sum(p.detach().square().sum() for p in module.parameters()))
    more = watch.reports[0]["pvd/objective_before"] - free.reports[0]["pvd/objective_before"]
    assert more == pytest.approx(0.25 * norm, rel=1e-5)


def test_a_part_of_the_samples_is_drawn_for_each_iteration() -> None:
    module = PVD(NETWORK, ADAM, processors=2, objective_samples=10)
    reports = iterate(module, batches(4), epochs=3)[0].reports
    for report in reports:
        assert report["pvd/objective_after"] <= report["pvd/objective_before"]
        assert report["pvd/accuracy"] * 10 == pytest.approx(round(report["pvd/accuracy"] * 10))
    assert reports[0]["pvd/objective_after"] != reports[1]["pvd/objective_before"]


def test_between_batches_the_weights_are_those_of_the_last_synchronisation() -> None:
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(flat([p.detach() for p in pl_module.parameters()]))

    module = PVD(NETWORK, ADAM, processors=2)
    module.configure_model()
    start = flat([p.detach() for p in module.parameters()])
    iterate(module, batches(3), epochs=2, callbacks=[Look()])
    assert torch.equal(seen[0], start) and torch.equal(seen[1], start)
    assert not torch.equal(seen[2], start)
    assert torch.equal(seen[3], seen[2]) and torch.equal(seen[4], seen[2])


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precisions(precision: str) -> None:
    module = PVD(NETWORK, ADAM, processors=2)
    reports = iterate(module, batches(3), epochs=3, precision=precision)[0].reports
    assert reports[-1]["pvd/objective_after"] < reports[0]["pvd/objective_before"]
    kind = torch.float64 if precision == "64-true" else torch.float32
    assert all(p.dtype == kind for p in module.parameters())


def test_a_loss_with_weights_is_what_is_minimised_and_validated() -> None:
    weights, data = [1.0, 0.2, 2.0, 0.5], batches(3)
    module = PVD(NETWORK, ADAM, processors=2, loss={"class_weights": weights}, chunk_samples=5)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    loader = DataLoader(data, batch_size=None)
    trainer.fit(module, loader, loader)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        expected = float(F.cross_entropy(module(x), y, torch.tensor(weights)))
    metrics = trainer.callback_metrics
    assert float(metrics["pvd/objective_after"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["val/loss"]) == pytest.approx(expected, rel=1e-5)
    assert metrics["pvd/objective_after"] < metrics["pvd/objective_before"]


def test_the_summary_says_what_is_done() -> None:
    options = {"clip_norm": 0.5, "regularisation": {"smoothness": 0.1}, "loss": {"label_smoothing": 0.1}}
    assert PVD(NETWORK, ADAM, processors=3, **options).describe() == (
        "pvd, adam, rate 0.01; 3 processors, rms directions, affine synchronisation; "
        "cross-entropy, label smoothing 0.1; each processor's gradient clipped at 0.5; smooth in time across cuts"
    )
    quick = PVD(NETWORK, ADAM, local_solver="lbfgs", forget_me_not=False, synchronisation="best")
    assert quick.describe() == "pvd, L-BFGS; 2 processors without forget-me-not, best synchronisation"


def test_it_stops_at_a_target_or_when_nothing_is_gained() -> None:
    easy = PVD(NETWORK, ADAM, processors=2, target_accuracy=0.05)
    assert iterate(easy, batches(2), epochs=5)[1].current_epoch == 1
    stuck = PVD(
        NETWORK, {"name": "sgd", "lr": 1e-9, "momentum": 0.0}, synchronisation="best", min_decrease=1e-3
    )
    assert iterate(stuck, batches(2), epochs=5)[1].current_epoch == 1
    assert iterate(PVD(NETWORK, ADAM, min_decrease=0.0), batches(2), epochs=3)[1].current_epoch == 3


def test_a_start_that_overflows_is_one_sentence() -> None:
    network = {**NETWORK, "activation": "relu", "dynamics": "euler", "horizon": 1e30}
    with pytest.raises(UserError, match=r"model\.horizon"):
        fit(PVD(network, ADAM), batches(2))


@pytest.mark.parametrize(
    ("network", "options", "key"),
    [
        ({}, {"processors": 7}, r"strategy\.processors=7 must be from 1 to the number of time steps, 6"),
        ({"normalisation": "batch"}, {}, r"model\.normalisation=batch"),
        ({}, {"synchronisation": "worst"}, r"strategy\.synchronisation=worst .* best, average, affine"),
        ({}, {"local_solver": "newton"}, r"strategy\.local_solver=newton .* first_order, lbfgs"),
        ({}, {"acceptance": "always"}, r"strategy\.acceptance=always .* no_worse"),
        ({}, {"local_solver": "lbfgs", "clip_norm": 1.0}, r"strategy\.clip_norm"),
        ({}, {"optimizer": {**ADAM, "name": "adamw", "weight_decay": 0.1}}, "adamw"),
        ({}, {"local_steps": 0}, r"strategy\.local_steps=0 must be at least 1"),
        ({}, {"chunk_samples": 0}, r"strategy\.chunk_samples=0"),
        ({}, {"objective_samples": 0}, r"strategy\.objective_samples=0"),
    ],
)
def test_what_does_not_go_together_names_its_key(
    network: dict[str, Any], options: dict[str, Any], key: str
) -> None:
    with pytest.raises(ValueError, match=key):
        PVD({**NETWORK, **network}, **{"optimizer": ADAM, **options})


def test_the_schedule_says_who_does_what() -> None:
    assert PVD(NETWORK, ADAM, processors=3).schedule(2).splitlines() == [
        "worker 0  1/3 of the gradient | processor 0 | 1/3 of the synchronisation",
        "worker 1  2/3 of the gradient | processor 1, then processor 2 | 2/3 of the synchronisation",
    ]


def test_validation_sees_the_synchronised_network() -> None:
    module = PVD(NETWORK, ADAM, processors=2)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    loader = DataLoader(batches(3), batch_size=None)
    trainer.fit(module, loader, loader)
    metrics = trainer.callback_metrics
    assert float(metrics["val/loss"]) == pytest.approx(float(metrics["pvd/objective_after"]), rel=1e-6)
    assert float(metrics["val/acc"]) == pytest.approx(float(metrics["pvd/accuracy"]))
