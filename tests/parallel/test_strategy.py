"""However many workers there are, the result is that of one process, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

from sglight.errors import UserError
from sglight.parallel.strategy import StageStrategy
from sglight.strategies.backprop import Backprop
from sglight.strategies.blend import Blend
from sglight.strategies.local import Local
from sglight.strategies.multilevel import Multilevel
from sglight.strategies.schedule import stage_names
from tests.parallel.training import ESTIMATOR, Job, Result, module, train_on
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches

# Generous: beside other work the first workers of a process take half a minute to start.
pytestmark = pytest.mark.timeout(300)

DYNAMICS = ("euler", "antisymmetric", "hamiltonian", "leapfrog")
LEVELS: dict[str, Any] = {
    "stages": 3,
    "levels": 2,
    "prolongation": "linear",
    "estimator": {**ESTIMATOR, "every_n_batches": 2},
}
TIMES = ("time/", "worker_", "speedup/")  # metrics that tell how long something took


def jobs() -> list[Job]:
    """Every dynamics, dense and convolutional, and every lag with each of these."""
    return [
        {"network": {**network, "dynamics": dynamics}, "options": {"stages": 4, "lag": i % 3}, "epochs": 1}
        for i, (network, dynamics) in enumerate(product((NETWORK, IMAGES), DYNAMICS))
    ]


@cache
def alone() -> list[Result]:
    """The results of one process."""
    return train_on(1, jobs())


OTHERS: dict[str, Job] = {
    "seldom lessons": {"network": NETWORK, "options": {"stages": 4, "estimator": {**ESTIMATOR, "every_n_batches": 3}}},
    "long lag": {"network": NETWORK, "options": {"stages": 4, "lag": 50}},
    "no diagnosis": {"network": IMAGES, "options": {"stages": 4, "diagnose_every_n_batches": 0}},
    "norms": {"network": {**IMAGES, "normalisation": "batch"}, "options": {"stages": 4}},
    "segments": {
        "network": {**IMAGES, "shape": (1, 8, 8), "channels": [4, 6], "steps": [3, 3]},
        "options": {"stages": 5, "estimator": {**ESTIMATOR, "name": "conv"}},
    },
    "reversible": {"network": {**NETWORK, "reversible": True}, "options": {"stages": 4}},
    "clipped, decayed": {
        "network": NETWORK,
        "options": {"stages": 4, "clip_norm": 0.1, "regularisation": {"smoothness": 0.1}},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    },
    "scheduled": {
        "network": NETWORK,
        "options": {"stages": 4, "scheduler": {"name": "plateau", "gamma": 0.5, "patience": 0, "min_factor": 0.0}},
        "epochs": 4,
    },
    "bf16": {"network": IMAGES, "options": {"stages": 4}, "trainer": {"precision": "bf16-mixed"}},
    "float64": {"network": NETWORK, "options": {"stages": 4}, "trainer": {"precision": "64-true"}},
    **{
        f"{name}, refined": {"network": {**NETWORK, "dynamics": name, "steps": 8}, "options": LEVELS, "epochs": 3}
        for name in DYNAMICS
    },
    "segments with norms, refined": {
        "network": {
            **IMAGES, "shape": (1, 8, 8), "channels": [4, 6], "steps": [4, 8], "normalisation": "group", "groups": 2,
        },
        "options": {**LEVELS, "levels": 3, "level": {"mode": ["dni", "exact", "dni"]}},
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "epochs": 3,
    },
    # A worker in the middle holds several pieces at once.
    "true gradients, in pieces": {
        "network": {**NETWORK, "dynamics": "euler"}, "kind": Backprop, "options": {"stages": 3, "microbatches": 4},
    },
    "true gradients, in pieces, looked at": {
        "network": {**NETWORK, "dynamics": "euler"}, "kind": Backprop,
        "options": {"stages": 3, "microbatches": 4, "diagnose_every_n_batches": 2},
    },
    "local": {"network": {**IMAGES, "normalisation": "batch"}, "kind": Local, "options": {
        "stages": 4, "ensemble": True, "head": {"name": "conv", "hidden": [5], "loss": "predsim"}}},
    "local, refined": {"network": {**NETWORK, "dynamics": "leapfrog", "steps": 8}, "kind": Multilevel, "options": {
        "stages": 3, "levels": 2, "level": {"mode": ["exact", "local"]}}},
    "blend": {"network": NETWORK, "kind": Blend, "options": {"stages": 4, "source": "synthetic", "blend_last": 0.0}},
    "late blend": {"network": {**IMAGES, "normalisation": "batch"}, "kind": Blend, "options": {
        "stages": 4, "arrival": "late", "source": "synthetic", "diagnose_every_n_batches": 2}},
    "residual": {"network": IMAGES, "options": {"stages": 4, "estimator": {
        "name": "conv", "hidden": [5], "kernel_size": 1, "form": "residual"}}},
    "sobolev": {"network": IMAGES, "options": {"stages": 4, "estimator": {
        "name": "conv", "hidden": [5], "form": "sobolev"}}},
    "late blend of heads": {"network": NETWORK, "kind": Blend, "options": {"stages": 4, "arrival": "late"}},
    "stopped in mid-epoch": {"network": NETWORK, "options": {"stages": 4, "lag": 2}, "trainer": {"max_steps": 10}},
}  # fmt: skip


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(TIMES)}


def assert_same(found: Any, expected: Any) -> None:
    """Parameters and metrics; and all workers know the same metrics and number of batches."""
    assert_equal(found.parameters, expected.parameters)
    (metrics,) = expected.metrics
    for others in found.metrics:
        assert without_times(others) == pytest.approx(without_times(metrics), abs=0, nan_ok=True)
    assert set(found.steps) == set(expected.steps)
    assert all(others == found.metrics[0] for others in found.metrics)


@pytest.mark.parametrize("workers", [2, 4])
def test_every_placement_gives_the_same_parameters_and_metrics(workers: int) -> None:
    for found, expected in zip(train_on(workers, jobs()), alone(), strict=True):
        assert len(found.metrics) == workers
        assert_same(found, expected)


def test_every_setting_gives_the_same_on_three_workers() -> None:
    todo = list(OTHERS.values())
    found, expected = train_on(3, todo), train_on(1, todo)
    for name, a, b in zip(OTHERS, found, expected, strict=True):
        print(name)
        assert_same(a, b)


def test_through_sockets_as_through_shared_memory() -> None:
    todo, (segments,) = [*jobs()[2:6], OTHERS["segments"]], train_on(1, [OTHERS["segments"]])
    found = train_on(2, todo, share_memory=False)
    for a, b in zip(found, [*alone()[2:6], segments], strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2)])
def test_a_checkpoint_is_read_by_any_other_placement(before: int, after: int, tmp_path: Path) -> None:
    scheduler = {"name": "cosine", "warmup_epochs": 1, "min_factor": 0.1}
    job: Job = {"network": IMAGES, "options": {"stages": 4, "lag": 2, "scheduler": scheduler}}
    savers = [
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1),
        ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1),
    ]
    (straight,) = train_on(1, [{**job, "epochs": 3}])
    train_on(before, [{**job, "epochs": 3, "callbacks": savers}])
    # Between two epochs, and in mid-epoch, when gradients are on their way.
    resumptions = [
        {**job, "epochs": 3, "ckpt": str(tmp_path / f"{name}.ckpt")}
        for name in ("epoch=0", "step=5", "step=10")
    ]
    test: Job = {**job, "test": True, "ckpt": str(tmp_path / "step=10.ckpt")}
    *resumed, tested = train_on(after, [*resumptions, test])
    for other in resumed:
        assert_equal(other.parameters, straight.parameters)
    (reference,) = train_on(1, [test])
    assert tested.metrics[0] == reference.metrics[0]
    assert tested.metrics[0].keys() == {"test/loss", "test/acc"}


def test_a_refined_network_goes_on_in_any_other_placement(tmp_path: Path) -> None:
    level = {"mode": ["exact", "dni"], "epochs": [1, 2], "lr": [1e-2, 5e-3]}
    network = {**IMAGES, "steps": 8}
    job: Job = {"network": network, "options": {"stages": 4, "levels": 2, "level": level}, "epochs": 3}
    savers = [
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1),
        ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1),
    ]
    (straight,) = train_on(1, [job])
    train_on(2, [{**job, "callbacks": savers}])
    # In mid-epoch of the exact level, at its end, and in mid-epoch of the finest.
    names = ("step=5", "epoch=0", "step=10")
    for workers in (1, 4):
        for resumed in train_on(workers, [{**job, "ckpt": str(tmp_path / f"{name}.ckpt")} for name in names]):
            assert_equal(resumed.parameters, straight.parameters)


def test_checkpoints_of_all_placements_are_the_same_file(tmp_path: Path) -> None:
    job: Job = {"network": NETWORK, "options": {"stages": 4, "lag": 2}}
    written = []
    for workers in (1, 2, 4):
        saver = ModelCheckpoint(
            tmp_path / str(workers), filename="{step}", every_n_train_steps=3, save_top_k=-1
        )
        train_on(workers, [{**job, "callbacks": [saver]}])
        written.append(torch.load(tmp_path / str(workers) / "step=6.ckpt", weights_only=True))
    for other in written[1:]:
        assert_equal(other["state_dict"], written[0]["state_dict"])
        for key in ("optimizer_states", "lr_schedulers", "in_flight", "sglight", "loops"):
            assert_nested_equal(other[key], written[0][key])


def assert_nested_equal(a: Any, b: Any) -> None:
    if isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            assert_nested_equal(a[key], b[key])
    elif isinstance(b, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_nested_equal(x, y)
    elif isinstance(b, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_early_stopping_and_the_best_epoch_are_decided_alike(tmp_path: Path) -> None:
    found = {}
    for workers in (1, 3):
        saver = ModelCheckpoint(tmp_path / str(workers), filename="{epoch}", monitor="val/acc", mode="max")
        stopping = EarlyStopping("val/loss", patience=1, mode="min")
        job: Job = {
            "network": NETWORK,
            "options": {"stages": 3},
            "optimizer": {"name": "adam", "lr": 0.2},
            "epochs": 30,
            "callbacks": [stopping, saver],
        }
        (collect,) = train_on(workers, [job])
        assert len(set(collect.steps)) == 1
        found[workers] = collect.steps[0], {p.name for p in (tmp_path / str(workers)).iterdir()}
    assert found[1] == found[3]
    assert found[1][0] < 30 * 7  # it did stop


@pytest.mark.parametrize("options", [{}, {"levels": 2}], ids=["dni", "multilevel"])
def test_a_script_gets_back_what_its_workers_have_learnt(options: dict[str, Any]) -> None:
    data, validation = batches(5), batches(3, seed=1)
    modules = [module({"network": NETWORK, "options": {"stages": 3, **options}}) for _ in range(2)]
    strategies: list[dict[str, Any]] = [{}, {"strategy": StageStrategy(threads=1), "devices": 2}]
    results = []
    for trained, where in zip(modules, strategies, strict=True):
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, **where,
        )  # fmt: skip
        trainer.fit(trained, DataLoader(data, batch_size=None), DataLoader(validation, batch_size=None))
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
        tested = trainer.test(trained, DataLoader(validation, batch_size=None), verbose=False)
        results.append((without_times(metrics), trainer.global_step, trainer.current_epoch, tested))
    assert_equal(modules[1].state_dict(), modules[0].state_dict())
    assert results[1] == results[0]


def test_no_worker_builds_what_it_does_not_own() -> None:
    trained = module({"network": NETWORK, "options": {"stages": 4}})
    groups = trained.groups(2)
    assert [i for group in groups for i in group] == [0, 1, 2, 3]
    trained.place(replace(trained.placement, own=groups[1]))
    trained.configure_model()
    assert list(trained.stages) == [str(i) for i in groups[1]]
    assert list(trained.estimators) == [str(i) for i in groups[1] if i < 3]
    whole = module({"network": NETWORK, "options": {"stages": 4}})
    whole.configure_model()
    part = trained.state_dict()
    assert_equal(part, {name: value for name, value in whole.state_dict().items() if name in part})


def test_groups_are_balanced_by_cost() -> None:
    trained = module({"network": {**NETWORK, "shape": (3000,)}, "options": {"stages": 6}})
    assert trained.cuts == tuple(range(7))
    assert trained.groups(2)[0] == range(1)  # the opening is dear
    assert [len(group) for group in trained.groups(6)] == [1] * 6
    with pytest.raises(ValueError, match=r"7 workers for 6 stage\(s\).*strategy\.stages.*trainer\.devices"):
        trained.groups(7)


def test_what_cannot_be_done_is_refused() -> None:
    loader = DataLoader(batches(1), batch_size=None)
    trainer = pl.Trainer(strategy=StageStrategy(), devices=2, accelerator="cpu", logger=False, max_epochs=1)
    with pytest.raises(UserError, match=r"2 workers for 1 stage"):
        trainer.fit(Backprop(NETWORK, ADAM), loader)
    trainer = pl.Trainer(strategy=StageStrategy(), devices=2, accelerator="cpu", logger=False, max_epochs=1)
    with pytest.raises(UserError, match="StageStrategy trains modules that have stages, not BoringModel"):
        trainer.fit(BoringModel(), loader)


LONGEST_LAG = 62


@pytest.mark.parametrize("share_memory", [True, False])
def test_the_longest_lag_works_however_tensors_travel(share_memory: bool) -> None:
    job: Job = {"network": NETWORK, "options": {"stages": 2, "lag": LONGEST_LAG}, "epochs": 1, "batches": 70}
    (found,), (expected,) = train_on(2, [job], share_memory), train_on(1, [job])
    assert_same(found, expected)


TOO_LONG: list[dict[str, Any]] = [
    {"lag": LONGEST_LAG + 1},
    {"lag": LONGEST_LAG + 1, "levels": 2, "level": {"mode": ["exact", "dni"]}},
]
REFUSAL = r"strategy\.lag=63 is too much .* 65 tensors .* 64 is the most; set strategy\.lag to 62 or less"


@pytest.mark.parametrize("options", TOO_LONG, ids=["dni", "multilevel"])
def test_a_longer_lag_is_refused_before_anything_starts(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sglight.parallel.strategy.launch", None)
    trainer = pl.Trainer(strategy=StageStrategy(), devices=2, accelerator="cpu", logger=False, max_epochs=1)
    with pytest.raises(UserError, match=REFUSAL):
        trainer.fit(module({"network": NETWORK, "options": {"stages": 2, **options}}), batches(1))


@pytest.mark.parametrize("share_memory", [True, False])
def test_a_longer_lag_is_refused_by_workers_however_tensors_would_travel(share_memory: bool) -> None:
    with pytest.raises(UserError, match=REFUSAL):
        train_on(2, [{"network": NETWORK, "options": {"stages": 2, "lag": LONGEST_LAG + 1}}], share_memory)


def test_names_of_groups() -> None:
    assert stage_names(range(2, 3)) == "stage 2"
    assert stage_names(range(2, 5)) == "stages 2-4"
    assert stage_names(range(2), "processor") == "processors 0-1"


@pytest.mark.parametrize(
    "surroundings",
    [
        SimpleNamespace(ps1=">>> ", flags=SimpleNamespace(interactive=0)),
        SimpleNamespace(flags=SimpleNamespace(interactive=1)),
    ],
    ids=["typed", "piped"],
)
def test_an_interactive_shell_is_told_what_to_do(surroundings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglight.parallel.strategy.sys", surroundings)
    with pytest.raises(UserError, match="save the code as a script and run that"):
        pl.Trainer(strategy=StageStrategy(), devices=2, accelerator="cpu", logger=False)
