"""Multilevel training against plain loops, and against the strategies that its levels are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from sglight.networks import StableNet, Stage
from sglight.strategies import descent
from sglight.strategies.backprop import Backprop
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.multilevel import Multilevel
from tests.parallel.training import Resumable
from tests.strategies.common import ADAM, IMAGES, NETWORK, assert_equal, batches, fit, step_by_mean, whole

ESTIMATOR = {"name": "mlp", "hidden": [9], "optimizer": {"name": "adam", "lr": 3e-3}}
DEEP = {**NETWORK, "steps": 8}
DYNAMICS = ("euler", "antisymmetric", "hamiltonian", "leapfrog")
KINDS = {
    **{name: {**DEEP, "dynamics": name} for name in DYNAMICS},
    **{f"conv {name}": {**IMAGES, "steps": 8, "dynamics": name} for name in DYNAMICS},
    "reversible": {**DEEP, "reversible": True},
    "norms": {**IMAGES, "steps": 8, "normalisation": "batch"},
    "segments": {**IMAGES, "shape": (1, 8, 8), "channels": [4, 6], "steps": [4, 8]},
}  # fmt: skip


def multilevel(
    network: dict[str, Any] = DEEP, optimizer: dict[str, Any] = ADAM, **options: Any
) -> Multilevel:
    """Synthetic gradients at the finest level, unless ``level`` has modes."""
    last = [*["exact"] * (options.get("levels", 2) - 1), "dni"]
    level = {"mode": last, **options.pop("level", {})}
    options = {"estimator": ESTIMATOR, "diagnose_every_n_batches": 1, **options}
    return Multilevel(network, optimizer, level=level, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_level_is_backprop_bit_for_bit(kind: str) -> None:
    network, data = KINDS[kind], batches(4, shape=KINDS[kind]["shape"])
    reference = Backprop(network, ADAM)
    staged = multilevel(network, stages=4, levels=1, level={"mode": "exact"}, microbatches=1)
    for module in (reference, staged):
        fit(module, data, epochs=2)
    if kind == "reversible":  # rebuilds states from the end of each stage, which is not the whole's
        for name, value in whole(staged).items():
            torch.testing.assert_close(value, whole(reference)[name], rtol=1e-3, atol=1e-4)
    else:
        assert_equal(whole(staged), whole(reference))


def test_one_dni_level_is_dni_bit_for_bit() -> None:
    data = batches(5)
    reference = DNI(DEEP, ADAM, stages=3, lag=2, estimator=ESTIMATOR)
    staged = multilevel(stages=3, lag=2, levels=1)
    for module in (reference, staged):
        fit(module, data, epochs=2)
    assert_equal(staged.state_dict(), reference.state_dict())


def test_in_an_exact_level_estimators_learn_from_true_gradients() -> None:
    """Against a plain loop: one backward pass through all stages, and then a lesson for each estimator."""
    data = batches(6)
    module = multilevel(stages=3, levels=2, level={"mode": ["exact", "dni"]})
    module.configure_model()
    stages = [Stage(module.spec, a, b) for a, b in zip(module.cuts, module.cuts[1:], strict=False)]
    estimators: list[Any] = [module.make_estimator(i) for i in range(2)]
    stage_adam = [torch.optim.Adam(s.parameters(), lr=1e-2) for s in stages]
    sg_adam = [torch.optim.Adam(e.parameters(), lr=3e-3) for e in estimators]
    for x, y in data:
        states = [x]
        for stage in stages:
            states.append(stage(states[-1]))
            states[-1].retain_grad()
        F.cross_entropy(states[-1], y, reduction="sum").backward()
        step_by_mean(stages, stage_adam, len(y))
        for sg, adam, h in zip(estimators, sg_adam, states[1:], strict=False):
            assert h.grad is not None
            adam.zero_grad()
            ((sg(h.detach(), y) - h.grad).pow(2).sum() / len(y)).backward()
            adam.step()
    fit(module, data, epochs=2, callbacks=[Stop(0)])
    for i, stage in enumerate(stages):
        assert_equal(module.stage(i).state_dict(), stage.state_dict())
    for i, sg in enumerate(estimators):
        assert_equal(module.estimators[str(i)].state_dict(), sg.state_dict())


def prolonged(values: Tensor, rule: str) -> Tensor:
    """The equation of `prolong`, sample by sample."""
    fine = []
    for j, value in enumerate(values):
        after = values[min(j + 1, len(values) - 1)]
        fine += [value, (value + after) / 2 if rule == "linear" else value]
    return torch.stack(fine)


def plain_loop(
    network: dict[str, Any], data: Any, epochs: list[int], rates: list[float], rule: str
) -> StableNet:
    """Adam by its equations (Kingma & Ba 2015) on the uncut network, from level to level, in float64."""
    steps = network["steps"] // 2 ** (len(epochs) - 1)
    net = StableNet(**{**network, "steps": steps}).double()
    m = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    v = {n: torch.zeros_like(p) for n, p in net.named_parameters()}
    t = 0
    for level, (count, lr) in enumerate(zip(epochs, rates, strict=True)):
        if level:
            values = {n: p.detach() for n, p in net.named_parameters()}
            net = StableNet(**{**network, "steps": steps * 2**level}).double()
            for name, p in net.named_parameters():
                fine = name.startswith("segments.")
                p.data = prolonged(values[name], rule) if fine else values[name]
                m[name] = prolonged(m[name], rule) / 2 if fine else m[name]
                v[name] = prolonged(v[name], rule) / 4 if fine else v[name]
        for x, y in data * count:
            t += 1
            net.zero_grad()
            F.cross_entropy(net(x.double()), y).backward()
            with torch.no_grad():
                for name, p in net.named_parameters():
                    assert p.grad is not None
                    m[name] = 0.9 * m[name] + 0.1 * p.grad
                    v[name] = 0.999 * v[name] + 0.001 * p.grad**2
                    p -= lr * (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
    return net


@pytest.mark.parametrize("rule", ["linear", "constant"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("kind", ["hamiltonian", "leapfrog", "conv euler", "conv antisymmetric"])
def test_equals_a_plain_loop(kind: str, stages: int, rule: str) -> None:
    network = KINDS[kind]
    data = batches(3, shape=network["shape"])
    level = {"mode": "exact", "epochs": [2, 1, 2], "lr": [3e-3, 2e-3, 1e-3]}
    module = multilevel(network, stages=stages, levels=3, level=level, prolongation=rule)
    module.configure_model()  # here, so that initial values are those of float32
    fit(module, data, epochs=5, precision="64-true")
    expected = plain_loop(network, data, level["epochs"], level["lr"], rule)  # type: ignore[arg-type]
    assert module.spec == expected.spec
    for name, value in whole(module).items():
        torch.testing.assert_close(value, expected.get_parameter(name).detach(), rtol=1e-9, atol=1e-11)


def test_moments_are_those_of_the_finer_gradient() -> None:
    """One coarse step, then a refinement: the first moment is 0.1 times the refined network's own gradient, to O(h)."""

    def error(steps: int) -> float:
        network = {**DEEP, "steps": steps, "init": "smooth"}
        ((x, y),) = data = batches(1, size=40)
        module = multilevel(
            network, {"name": "adam", "lr": 1e-9}, stages=1, levels=2, level={"mode": "exact"}
        )
        seen: list[Tensor] = []

        class Look(Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if pl_module.level:
                    weight = pl_module.stage(0).segments["0"].weight
                    seen.append(trainer.strategy.optimizers[0].state[weight]["exp_avg"].clone())

        fit(module, data, epochs=2, callbacks=[Look()])
        F.cross_entropy(module(x), y).backward()
        gradient = module.stage(0).segments["0"].weight.grad
        assert isinstance(gradient, Tensor)
        return ((seen[0] / 0.1 - gradient).norm() / gradient.norm()).item()

    assert error(16) < 0.1 and error(64) < error(16) / 3


def test_moments_can_be_reset() -> None:
    module = multilevel(stages=1, levels=2, level={"mode": "exact", "epochs": [1, 1]}, moments="reset")
    fit(module, batches(3), epochs=2)
    steps = {float(state["step"]) for state in module.trainer.strategy.optimizers[0].state.values()}
    assert steps == {3.0}


def test_estimators_are_left_alone_and_boundaries_stay_at_their_times() -> None:
    kept: list[Any] = []

    class Look(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            optimizer = pl_module.estimator(0).optimizer
            kept.append(
                (
                    pl_module.plan.boundary(0).time,
                    pl_module.estimators.state_dict(),
                    optimizer.state_dict()["state"],
                )
            )
            kept[-1] = [kept[-1][0], *({k: copied(v) for k, v in d.items()} for d in kept[-1][1:])]

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and kept:
                self.on_train_epoch_end(trainer, pl_module)

    module = multilevel(stages=2, levels=2, level={"epochs": [1, 1], "estimator_lr": [1e-3, 2e-3]})
    fit(module, batches(3), epochs=2, callbacks=[Look()])
    (time, parameters, state), (fine_time, fine_parameters, fine_state) = kept[:2]
    assert time == fine_time
    assert_equal(fine_parameters, parameters)
    for k, values in state.items():
        assert_equal(fine_state[k], values)
    assert module.estimator(0).optimizer.param_groups[0]["lr"] == 2e-3  # type: ignore[attr-defined]


def copied(value: Any) -> Any:
    return {k: v.clone() for k, v in value.items()} if isinstance(value, dict) else value.clone()


class Rates(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]))


def test_the_schedule_goes_on_across_levels() -> None:
    rates = Rates()
    level = {"mode": "exact", "epochs": [1, 3], "lr": [1e-2, 3e-3]}
    module = multilevel(stages=2, levels=2, level=level, scheduler={"name": "cosine", "min_factor": 0.1})
    fit(module, batches(5), epochs=4, callbacks=[rates])
    assert [step for step, _ in rates.seen] == list(range(1, 21))
    for step, rate in rates.seen:
        cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 20))
        assert rate == pytest.approx((1e-2 if step <= 5 else 3e-3) * cosine)


def test_plateau_keeps_its_falls_across_levels() -> None:
    rates = Rates()
    scheduler = {"name": "plateau", "gamma": 0.5, "patience": 0, "min_factor": 0.0}
    level = {"mode": "exact", "epochs": [3, 1], "lr": [1e-6, 2e-6]}
    module = multilevel(stages=1, levels=2, level=level, scheduler=scheduler)
    trainer(epochs=4, callbacks=[rates]).fit(module, loader(batches(2)), loader(batches(2, seed=1)))
    # The first validation is the best; every other one of the same network halves the rate.
    assert [rate for _, rate in rates.seen[::2]] == pytest.approx([1e-6, 1e-6, 5e-7, 2 * 2.5e-7], abs=0)


def loader(data: Any) -> Any:
    return DataLoader(data, batch_size=None)


def trainer(**options: Any) -> pl.Trainer:
    options = {"max_epochs": options.pop("epochs", 3), "enable_checkpointing": False, **options}
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, log_every_n_steps=1, **options,
    )  # fmt: skip


class Jump(Callback):
    """How much the logits of fixed samples change in each refinement."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.changes = x, list[float]()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            self.before = pl_module(self.x)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and pl_module.level:
            with torch.no_grad():
                self.changes.append((pl_module(self.x) - self.before).norm().item())


@pytest.mark.parametrize("rule", ["linear", "constant"])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_the_jump_falls_with_the_step_size(dynamics: str, rule: str) -> None:
    network = {**NETWORK, "steps": 128, "dynamics": dynamics, "init": "smooth"}
    data = batches(3)
    module, jump = multilevel(network, stages=2, levels=6, prolongation=rule), Jump(data[0][0])
    trainer(epochs=6, callbacks=[jump]).fit(module, loader(data), loader(data))
    ratios = [a / b for a, b in zip(jump.changes, jump.changes[1:], strict=False)]
    # First order: in the end each halving of h halves the jump, which must not be noise to begin with.
    assert jump.changes[0] > 1e-2
    assert all(ratio > 1.2 for ratio in ratios) and 1.7 < ratios[-1] < 2.3, (jump.changes, ratios)
    for facts in module.history[1:]:
        assert facts["loss_after"] == pytest.approx(facts["loss_before"], abs=0.1)


@pytest.fixture
def savers(tmp_path: Path) -> list[Callback]:
    return [
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1),
        ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=1, save_top_k=-1),
    ]


@pytest.mark.parametrize("kind", ["hamiltonian", "leapfrog", "norms", "segments"])
def test_resuming_in_any_level_ends_bit_identical(kind: str, savers: list[Callback], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "network": KINDS[kind], "stages": 2, "levels": 3, "lag": 2, "scheduler": {"name": "cosine", "min_factor": 0.0},
        "level": {"mode": ["exact", "dni", "exact"], "epochs": [1, 2, 1], "lr": [1e-2, 5e-3, 2e-3]},
    }  # fmt: skip

    def train(ckpt: Path | None = None, callbacks: list[Callback] | None = None) -> Multilevel:
        module, t = (
            multilevel(**options),
            trainer(epochs=4, callbacks=callbacks, enable_checkpointing=bool(callbacks)),
        )
        data = Resumable(batches(5, shape=KINDS[kind]["shape"]))
        data.trainer = t
        validation = loader(batches(2, shape=KINDS[kind]["shape"], seed=1))
        t.fit(module, data, validation, ckpt_path=ckpt, weights_only=True)
        assert t.global_step == 20
        return module

    straight = train(callbacks=savers)
    # In mid-epoch with lessons under way, and at the end of an epoch: of the same level, or the last of one.
    for name in ("step=3", "step=9", "step=18", "epoch=0", "epoch=1", "epoch=2"):
        resumed = train(tmp_path / f"{name}.ckpt")
        assert_equal(resumed.state_dict(), straight.state_dict())
        for facts, others in zip(resumed.history, straight.history, strict=True):
            assert facts["steps"] == others["steps"]
            assert facts.get("loss_after") == others.get("loss_after")
            assert facts["val_loss"] == others["val_loss"]
            assert 0 < facts["fit_s"] < 60  # no matter where its first epoch began


def test_a_checkpoint_is_tested_at_its_level(savers: list[Callback], tmp_path: Path) -> None:
    options: dict[str, Any] = {"stages": 2, "levels": 2}
    validation = loader(batches(2, seed=1))
    trainer(epochs=2, callbacks=savers, enable_checkpointing=True).fit(
        module := multilevel(**options), loader(batches(3)), validation
    )
    assert module.level == 1
    for epoch, steps in ((0, 4), (1, 8)):
        tested = multilevel(**options)
        path = tmp_path / f"epoch={epoch}.ckpt"
        (metrics,) = trainer().test(tested, validation, ckpt_path=path, weights_only=True, verbose=False)
        assert tested.spec.total_steps == steps
        assert metrics["test/loss"] == module.history[epoch]["val_loss"]


def test_what_a_run_reports_of_its_levels() -> None:
    module = multilevel(stages=2, levels=2, level={"epochs": [1, None]})
    t = trainer(epochs=3)
    t.fit(module, loader(batches(3)), loader(batches(2, seed=1)))
    results = module.results()
    assert [results[f"level_{k}/steps"] for k in range(2)] == [4, 8]
    assert [results[f"level_{k}/epochs"] for k in range(2)] == [1, 2]
    assert results["level_1/val_acc"] == float(t.callback_metrics["val/acc"])
    assert results["level_0/val_loss"] == pytest.approx(results["level_1/loss_before"], rel=1e-5)
    assert results["level_1/fit_s"] > 0 and results["level_1/cpu_s"] > 0
    assert t.callback_metrics["level"] == 1
    assert 1 < t.callback_metrics["speedup/theoretical"] < 2


def test_without_validation_data_there_is_no_jump_to_report() -> None:
    module = multilevel(stages=2, levels=2)
    fit(module, batches(3), epochs=2)
    assert module.level == 1 and "loss_after" not in module.history[1]


def test_bf16_refines() -> None:
    module = multilevel(stages=2, levels=2)
    t = trainer(epochs=2, precision="bf16-mixed")
    t.fit(module, loader(batches(3)), loader(batches(2, seed=1)))
    assert module.history[1]["loss_after"] == pytest.approx(module.history[1]["loss_before"], rel=0.2)


def test_cuts_are_at_coarse_steps_and_groups_are_those_of_the_finest() -> None:
    module = multilevel({**DEEP, "steps": 16}, stages=3, levels=3)
    assert module.cuts[-1] == 4 and module.spec.total_steps == 4
    finest = DNI({**DEEP, "steps": 16}, ADAM, stages=3, estimator=ESTIMATOR).spec
    fine = [4 * cut for cut in module.cuts]
    work = finest.stage_work(fine, module.plan.source.cost(finest))
    bounds = [group.start for group in module.groups(2)]
    loads = [sum(work[: bounds[1]]), sum(work[bounds[1] :])]
    assert max(loads) == min(max(sum(work[:b]), sum(work[b:])) for b in (1, 2))
    assert module.spec.total_steps == 4  # asking has changed nothing


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ({**DEEP, "steps": 6}, {"levels": 3}, r"model\.steps=\[6\] cannot be divided by 4"),
        (
            DEEP,
            {"levels": 3, "stages": 3},
            r"strategy\.stages=3 must be from 1 .* coarsest level, 4 times fewer",
        ),
        (
            DEEP,
            {"prolongation": "cubic"},
            r"strategy\.prolongation=cubic is unknown; choose linear or constant",
        ),
        (DEEP, {"moments": "drop"}, r"strategy\.moments=drop is unknown; choose prolong or reset"),
        ({**DEEP, "dynamics": "leapfrog", "initial_velocity": "paper"}, {}, r"model\.initial_velocity=paper"),
    ],
)
def test_what_is_refused(network: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multilevel(network, **options)


def test_epochs_that_do_not_add_up_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_epochs=3 is not the sum"):
        fit(multilevel(level={"epochs": [1, 1]}), batches(2), epochs=3)


@pytest.mark.parametrize("name", ["adam", "sgd", "adamw"])
def test_decay_of_the_weights_grows_with_the_steps_as_gradients_do(name: str) -> None:
    optimizer = {"name": name, "lr": 0.01, "weight_decay": 0.1, "momentum": 0.0}
    module = Multilevel(DEEP, optimizer, stages=1, levels=3)
    module.configure_model()
    for plan, factor in zip(module.plans, (4, 2, 1), strict=True):
        module.zero_grad()
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        descent.prepare_stage(plan, module.stage(0), 7)
        for key, parameter in module.stage(0).named_parameters():
            # The optimiser itself adds the decay of the finest steps.
            more = 0.1 * (factor - 1) if key.startswith("segments.") and name != "adamw" else 0.0
            torch.testing.assert_close(parameter.grad, more * parameter.detach())


def test_progress_is_gone_on_from() -> None:
    module = Multilevel(DEEP, ADAM, stages=2, levels=2)
    module.configure_model()
    earlier = {**module.progress(), "next_diagnosis": 50}
    module.restore_progress(earlier)
    assert module.progress() == earlier


# A fit behind another.


def test_a_second_fit_trains_the_finest_level() -> None:
    module = multilevel(stages=2, levels=2, level={"epochs": [1, 2]})
    fit(module, batches(4), epochs=3)
    reference = DNI(DEEP, ADAM, stages=2, estimator=ESTIMATOR)
    reference.configure_model()
    reference.load_state_dict(module.state_dict())
    for trained in (module, reference):
        fit(trained, batches(4, seed=2), epochs=5)
    assert_equal(module.state_dict(), reference.state_dict())
    assert [facts["epochs"] for facts in module.history] == [5] and module.history[0]["steps"] == 8


class Stop(Callback):
    """Ends the training behind an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def test_a_second_fit_goes_on_at_the_level_that_was_reached() -> None:
    module = multilevel(stages=2, levels=3, level={"epochs": [1, 2, 3]})
    with pytest.warns(UserWarning, match="ended with 4 of 8 steps, before the finest level"):
        fit(module, batches(3), epochs=6, callbacks=[Stop(1)])
    assert module.level == 1
    with pytest.raises(ValueError, match=r"max_epochs=6 is not the sum of strategy\.level\.epochs=\[2, 3\]"):
        fit(module, batches(3), epochs=6)
    fit(module, batches(3), epochs=5)
    assert [(facts["steps"], facts["epochs"]) for facts in module.history] == [(4, 2), (8, 3)]


def test_a_trainer_goes_on_with_more_epochs() -> None:
    module = multilevel(stages=2, levels=2, level={"epochs": [1, 2]})
    t = fit(module, batches(3), epochs=3)
    t.fit_loop.max_epochs = 7
    t.fit(module, loader(batches(3)))
    assert (t.current_epoch, t.global_step, module.runtime.batch) == (7, 21, 21)
    assert [(facts["steps"], facts["epochs"]) for facts in module.history] == [(8, 4)]


# Early stopping.


def never_better(**options: Any) -> EarlyStopping:
    """Stops behind the second value."""
    return EarlyStopping(**{"monitor": "train/loss", "patience": 1, "min_delta": 100.0, **options})


@pytest.mark.parametrize(
    ("stopping", "options", "epochs"),
    [
        ({}, {}, [2, 2, 2]),
        ({"monitor": "val/loss", "check_on_train_epoch_end": False}, {}, [2, 2, 2]),
        ({"monitor": "val/loss", "check_on_train_epoch_end": False}, {"val_check_interval": 0.5}, [1, 1, 1]),
        ({"patience": 9, "stopping_threshold": 100.0}, {}, [1, 1, 1]),
        ({"monitor": "val/loss", "patience": 3}, {}, [4, 4, 4]),
    ],
    ids=["training loss", "validation", "in mid-epoch", "threshold", "patient"],
)
def test_a_level_that_is_stopped_early_is_refined(
    stopping: dict[str, Any], options: dict[str, Any], epochs: list[int]
) -> None:
    module = multilevel(stages=2, levels=3, level={"epochs": [4, 4, 4]})
    t = trainer(epochs=12, callbacks=[never_better(**stopping)], **options)
    t.fit(module, loader(batches(4)), loader(batches(2, seed=1)))
    assert [facts["epochs"] for facts in module.history] == epochs
    assert t.current_epoch == sum(epochs) and module.is_finest


def test_epochs_that_are_saved_are_the_finest_levels() -> None:
    module = multilevel(stages=2, levels=2, level={"epochs": [5, 2]})

    class Impatient(EarlyStopping):
        """Of the coarse level only."""

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if pl_module.level == 0:
                super().on_train_epoch_end(trainer, pl_module)

    fit(module, batches(2), epochs=7, callbacks=[Impatient("train/loss", patience=1, min_delta=100.0)])
    assert [facts["epochs"] for facts in module.history] == [2, 5]


class Diverges(Callback):
    """Gives the training of a coarse level a loss that is not a number."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.log("some", math.nan)


@pytest.mark.parametrize(
    "callbacks",
    [lambda: [Diverges(), EarlyStopping("some")], lambda: [Stop(1), never_better()]],
    ids=["not finite", "something else stops as well"],
)
def test_what_ends_a_training_for_good_says_so(callbacks: Any) -> None:
    module = multilevel(stages=2, levels=2, level={"epochs": [4, 4]})
    with pytest.warns(UserWarning, match="before the finest level"):
        fit(module, batches(2), epochs=8, callbacks=callbacks())
    assert module.level == 0


def test_a_training_that_was_stopped_early_in_a_level_is_resumed(tmp_path: Path) -> None:
    def train(ckpt: Path | None = None) -> tuple[Multilevel, pl.Trainer]:
        module = multilevel(stages=2, levels=2, level={"epochs": [4, 4]}, scheduler={"name": "cosine"})
        saver = ModelCheckpoint(
            tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
        )
        t = trainer(epochs=8, callbacks=[saver, never_better(patience=2)], enable_checkpointing=True)
        t.fit(module, loader(batches(3)), loader(batches(2, seed=1)), ckpt_path=ckpt, weights_only=True)
        return module, t

    straight, t = train()
    assert [facts["epochs"] for facts in straight.history] == [3, 3]
    for epoch in (1, 2, 3):
        resumed, other = train(tmp_path / f"epoch={epoch}.ckpt")
        assert_equal(resumed.state_dict(), straight.state_dict())
        assert other.current_epoch == t.current_epoch


@pytest.mark.parametrize("m", [1, 3])
def test_one_delayed_level_is_delayed_and_an_exact_one_backprop(m: int) -> None:
    data = batches(5)
    for mode, reference in (
        ("delayed", Delayed(DEEP, ADAM, stages=3, microbatches=m)),
        ("exact", Backprop(DEEP, ADAM, stages=3, microbatches=m)),
    ):
        module = Multilevel(DEEP, ADAM, stages=3, levels=1, level={"mode": mode}, microbatches=m)
        for each in (module, reference):
            fit(each, data, epochs=2)
        assert_equal(module.state_dict(), reference.state_dict())


@pytest.mark.parametrize(
    ("modes", "moments", "forgotten"),
    [
        (["exact", "delayed"], None, True),
        (["exact", "delayed"], "prolong", False),
        (["exact", "exact"], None, False),
        (["delayed", "delayed"], None, False),
        (["exact", "exact"], "reset", True),
    ],
)
def test_moments_are_fresh_where_late_gradients_begin(
    modes: list[str], moments: str | None, forgotten: bool
) -> None:
    found = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if module.level == 1 and not found:
                found.append([bool(optimizer.state) for optimizer in trainer.optimizers])

    module = Multilevel(DEEP, ADAM, stages=2, level={"mode": modes}, moments=moments)
    fit(module, batches(3), epochs=2, callbacks=[Look()])
    assert found == [[not forgotten] * 2]


def test_a_level_has_its_own_number_of_pieces() -> None:
    level = {"mode": ["exact", "delayed"], "microbatches": [4, 1]}
    module = Multilevel(DEEP, ADAM, stages=2, level=level, microbatches=3)
    assert [plan.schedule.pieces for plan in module.plans] == [4, 1]
    fit(module, batches(2), epochs=2)
    assert [plan.schedule.pieces for plan in module.plans] == [4, 1]


def test_levels_without_synthetic_gradients_have_no_estimators() -> None:
    module = Multilevel(DEEP, ADAM, stages=2, level={"mode": ["exact", "delayed"]})
    fit(module, batches(2), epochs=2)
    assert not module.estimators
    mixed = multilevel(stages=2, levels=3, level={"mode": ["delayed", "exact", "dni"]})
    fit(mixed, batches(2), epochs=3)
    assert list(mixed.estimators) == ["0"]
