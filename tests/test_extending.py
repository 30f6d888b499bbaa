"""The parts of docs/extending.md, which live outside the package: a dynamics, an estimator, a schedule and so on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class
from omegaconf import DictConfig

from sglight import start as start_module
from sglight.config.composing import CONF, check, to_plain
from sglight.config.schema import OptimizerConfig, SchedulerConfig
from sglight.errors import UserError
from sglight.experiment import build_datamodule, build_module
from sglight.gradients import prediction_cost, synthetic_gradient
from sglight.networks import NetworkSpec, StableNet
from sglight.networks.segment import Segment
from sglight.strategies.simulation import StageTimes, speedup

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "dataset=ellipse", "dataset.train_points=90", "dataset.val_points=30", "dataset.test_points=30",
    "model.channels=4", "model.steps=4", "trainer.max_epochs=2", "trainer.accelerator=cpu", "trainer.threads=1",
    "callbacks.progress.enabled=false", "callbacks.figures.enabled=false", "callbacks.timeline.enabled=false",
    "callbacks.gradient_quality.enabled=false", "logger=none",
)  # fmt: skip


def blocks() -> dict[str, str]:
    """The files of docs/extending.md, by the names that begin them."""
    text = (ROOT / "docs" / "extending.md").read_text()
    found = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", text, re.DOTALL)
    return dict(found)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A researcher's folder with the files of docs/extending.md, and some beside them."""
    top = tmp_path_factory.mktemp("researcher")
    beside = {
        "my_package/wrong.py": """
import torch
from pytorch_lightning import LightningDataModule
from sglight.gradients import Estimator
from sglight.networks.dynamics import Dynamics

class Still(Dynamics):
    pass

class Half(LightningDataModule):
    def __init__(self, name):
        super().__init__()
        self.name, self.shape, self.classes = name, (2,), 2

class Random(Estimator):
    def __init__(self, shape, classes, hidden, conditional, kernel_size, seed):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(shape))

    def estimate(self, state, labels, time):
        return torch.zeros_like(state)

    def learn(self, state, labels, target, time):
        return target.square().sum()
""",
        "my_package/together.py": """
from sglight.strategies.dni import DNI

class Mine(DNI):
    pass
""",
        "my_conf/strategy/mine.yaml": """
_target_: my_package.together.Mine
stages: 2
optimizer: {name: adam, lr: 0.002}
estimator: {name: my_package.estimators.ByClass}
""",
        "my_conf/dataset/half.yaml": "_target_: my_package.wrong.Half\nname: half\n",
        "my_package/__init__.py": "",
    }
    for name, text in {**blocks(), **beside}.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(text)
    return top


@pytest.fixture
def mine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DictConfig]]:
    """``mine("model=midpoint")``: the config of that command line with ``--config-dir my_conf``, checked."""
    monkeypatch.syspath_prepend(str(folder))

    def composed(*overrides: str) -> DictConfig:
        GlobalHydra.instance().clear()
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="sglight"):
            path = f"hydra.searchpath=[file://{folder / 'my_conf'}]"
            return check(compose("config", overrides=[path, *overrides]))

    yield composed
    GlobalHydra.instance().clear()


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def test_the_page_shows_each(folder: Path) -> None:
    assert set(blocks()) == {
        "my_package/dynamics.py", "my_conf/model/midpoint.yaml", "my_package/estimators.py", "my_package/schedules.py",
        "my_package/strategies.py", "my_conf/strategy/replay.yaml", "my_package/data.py", "my_conf/dataset/moons.yaml",
        "my_package/callbacks.py", "my_conf/callbacks/mine.yaml", "my_package/loggers.py", "my_conf/logger/text.yaml",
    }  # fmt: skip


@pytest.mark.parametrize("kernel", ["dense", "conv"])
def test_a_dynamics_is_reversed_rebuilt_and_cut_like_ours(mine: Any, kernel: str) -> None:
    name = "my_package.dynamics.Midpoint"
    image = () if kernel == "dense" else (6, 6)
    state = torch.randn(3, 8, *image, dtype=torch.float64, requires_grad=True)
    stored, rebuilt = (
        Segment(name, 4, 4, kernel, reversible=reversible, seed=1).double() for reversible in (False, True)
    )
    assert torch.allclose(stored.inverse(stored(state)), state)
    (a,) = torch.autograd.grad(stored(state).square().sum(), state)
    (b,) = torch.autograd.grad(rebuilt(state).square().sum(), state)
    assert torch.allclose(a, b)
    spec = NetworkSpec((2,), 2, dynamics=name, channels=4)
    assert spec.state_shape(3) == (8,)
    assert StableNet(shape=(2,), classes=2, dynamics=name, channels=4)(torch.randn(5, 2)).shape == (5, 2)


def test_a_dynamics_by_its_path_and_by_a_yaml_is_the_same_run_that_goes_on(mine: Any, tmp_path: Path) -> None:
    start_module.run(mine(*SMALL, "model.dynamics=my_package.dynamics.Midpoint"), tmp_path / "a")
    start_module.run(mine(*SMALL, "model=midpoint", "model.horizon=4.0"), tmp_path / "b")
    assert metrics(tmp_path / "a")["val/loss"] == metrics(tmp_path / "b")["val/loss"]
    ckpt = f"ckpt={tmp_path / 'a' / 'checkpoints' / 'last.ckpt'}"
    start_module.run(
        mine(*SMALL, "model.dynamics=my_package.dynamics.Midpoint", "trainer.max_epochs=3", ckpt),
        tmp_path / "c",
    )
    assert metrics(tmp_path / "c")["run/epochs"] == 3
    with pytest.raises(UserError, match=r"model\.dynamics=my_package\.dynamics\.Midpoint"):
        start_module.run(mine(*SMALL, "trainer.max_epochs=3", ckpt), tmp_path / "d")


def test_an_estimator_is_made_costed_and_taught(mine: Any, tmp_path: Path) -> None:
    cfg = mine(
        *SMALL, "strategy=dni", "strategy.estimator.name=my_package.estimators.ByClass", "strategy.stages=3"
    )
    plain = to_plain(cfg)
    module: Any = build_module(plain, build_datamodule(plain))
    assert prediction_cost("my_package.estimators.ByClass", (8,), (), 3) == 8
    module.configure_model()
    assert [type(e).__name__ for e in module.estimators.values()] == ["ByClass"] * 2
    start_module.run(cfg, tmp_path)
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    learnt = [value for key, value in saved.items() if key.startswith("estimators.")]
    assert len(learnt) == 2
    assert all(value.any() for value in learnt), "they begin at zero"


def test_a_callback_by_a_yaml_goes_on_with_the_run(mine: Any, tmp_path: Path) -> None:
    start_module.run(mine(*SMALL, "callbacks=mine"), tmp_path)
    assert metrics(tmp_path)["mine/largest_loss"] > 0
    assert "stability" in mine("callbacks=mine").callbacks, "ours are still there"


def table() -> dict[str, list[str]]:
    """What docs/extending.md says is to be subclassed, for each part: dotted paths of classes."""
    text = (ROOT / "docs" / "extending.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| an? ", line)]
    return {row[0]: re.findall(r"`([\w.]+\.[A-Z]\w+)`", row[1]) for row in rows}


def test_the_page_lists_where_each_part_goes() -> None:
    known = table()
    for part in (
        "dynamics",
        "estimator",
        "schedule",
        "gradient source",
        "strategy",
        "data set",
        "callback",
        "logger",
    ):
        (paths,) = (paths for name, paths in known.items() if name.endswith(f" {part}"))
        assert paths, part
        for path in paths:
            assert isinstance(get_class(path), type)


def test_a_schedule_is_simulated_printed_and_carried_out(mine: Any) -> None:
    plain = to_plain(mine("dataset=moons", *SMALL[4:], "strategy=replay", "strategy.stages=2"))
    module = build_module(plain, build_datamodule(plain))
    schedule = module.plan.schedule
    assert type(schedule).__name__ == "Late"
    assert [schedule.staleness(i, 5, 1) for i in (0, 1)] == [1, 0]
    assert "gradients up to M - 1 batches late" in module.schedule(2)
    alone, pair = StageTimes(forward=1.0, backward=2.0), [range(1), range(1, 2)]
    assert speedup(schedule, pair, [alone, alone]) == pytest.approx(2.0)


def test_a_logger_by_a_yaml_logs_beside_ours(mine: Any, tmp_path: Path) -> None:
    start_module.run(mine(*SMALL[:-1], "logger=[csv,text]"), tmp_path)
    lines = (tmp_path / "metrics.txt").read_text().splitlines()
    assert any(line.split()[1] == "val/acc" for line in lines)
    assert (tmp_path / "metrics.csv").is_file()


def test_an_optimizer_and_a_schedule_by_their_paths(mine: Any, tmp_path: Path) -> None:
    options = (
        *SMALL, "strategy=backprop", "strategy.optimizer.name=torch.optim.RMSprop", "strategy.optimizer.lr=0.01",
        "+strategy.optimizer.kwargs={alpha: 0.5}", "strategy.scheduler.name=torch.optim.lr_scheduler.StepLR",
        "+strategy.scheduler.kwargs={step_size: 2, gamma: 0.5}",
    )  # fmt: skip
    start_module.run(mine(*options), tmp_path)
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    (group,) = saved["optimizer_states"]["stage_0"]["param_groups"]
    assert (group["alpha"], group["lr"]) == (0.5, 0.01 * 0.5**2), "four updates"


def test_sections_in_part_have_the_schemas_defaults(mine: Any) -> None:
    plain = to_plain(
        mine(*SMALL, "strategy=mine", "~strategy.optimizer.name", "+strategy.scheduler.name=plateau")
    )
    module = build_module(plain, build_datamodule(plain))
    assert module.plan.optimizer == {**vars(OptimizerConfig()), "lr": 0.002}
    assert module.plan.scheduler == {**vars(SchedulerConfig()), "name": "plateau"}
    wrong = to_plain(mine(*SMALL, "strategy=mine", "+strategy.optimizer.momentun=0.5"))
    with pytest.raises(UserError, match=r"strategy\.optimizer\.momentun is unknown; did you mean .*momentum"):
        build_module(wrong, build_datamodule(wrong))


PARTIAL = {
    "": None,
    "scheduler: {warmup_epochs: 1}": None,
    "scheduler: null": None,
    "regularisation: {smoothness: 0.1}": None,
    "estimator: {name: linear}": None,
    "estimator: {optimizer: {lr: 0.1}}": None,
    "loss: {label_smoothing: 0.1}": None,
    "optimizer: null": None,
    "optimizer: {lr: fast}": r"strategy\.optimizer\.lr=fast is not allowed; it must be a number",
    "optimizer: adam": r"strategy\.optimizer=adam is not allowed; set its keys instead: strategy\.optimizer\.name",
    "optimizer: {betas: [0.9, x]}": r"strategy\.optimizer\.betas\[1\]=x is not allowed",
    "scheduler: {warmup: 1}": r"strategy\.scheduler\.warmup is unknown; did you mean .*warmup_epochs",
    "regularisation: {smothness: 1}": r"strategy\.regularisation\.smothness is unknown; did you mean",
    "loss: {label_smoothing: 2}": r"strategy\.loss\.label_smoothing=2(\.0)? is not allowed",
    "estimator: {name: conv}": r"strategy\.estimator\.name=conv works on images",
    "estimator: {hidden: 5}": r"strategy\.estimator\.hidden=5 is not allowed; it must be a list",
    "stages: two": r"strategy\.stages=two is not allowed; it must be a whole number",
    "stages: null": r"strategy\.stages=null is not allowed",
    "width: 3": r"strategy\.width is unknown to Mine; .*lag, loss",
    "_target_: null": r"strategy\._target_ is missing",
    "_target_: sglight.strategies.multilevel.Multilevel\nlevels: 2": None,
    "_target_: sglight.strategies.multilevel.Multilevel\nlevels: 2\nlevel: {mode: exact}": None,
    "_target_: sglight.strategies.multilevel.Multilevel\nlevel: exact": r"strategy\.level=exact is not allowed",
    "_target_: sglight.strategies.multilevel.Multilevel\nlevel: {mod: x}": r"strategy\.level\.mod is unknown",
    "_target_: sglight.strategies.pvd.PVD\nprocessors: x": r"strategy\.processors=x is not allowed",
}


@pytest.mark.parametrize("text", PARTIAL)
def test_a_strategy_without_a_schema_may_be_written_in_part(mine: Any, folder: Path, text: str) -> None:
    target = "" if text.startswith("_target_") else "_target_: my_package.together.Mine\n"
    optimizer = "" if text.startswith("optimizer") else "optimizer: {lr: 0.01}\n"
    (folder / "my_conf/strategy/partial.yaml").write_text(f"{target}{optimizer}{text}\n")

    def build() -> Any:
        plain = to_plain(mine(*SMALL, "strategy=partial"))
        return build_module(plain, build_datamodule(plain))

    if PARTIAL[text] is None:
        build().configure_model()
        return
    with pytest.raises(UserError, match=str(PARTIAL[text])):
        build()


def test_stages_that_are_left_to_the_class_may_have_workers(mine: Any) -> None:
    # Whether there are enough of them is known once the module is built.
    mine(*SMALL, "strategy=mine", "~strategy.stages", "trainer.devices=2")


def test_a_data_set_that_lacks_an_argument_names_it(mine: Any, folder: Path) -> None:
    (folder / "my_conf/dataset/lacking.yaml").write_text("_target_: my_package.wrong.Half\nnam: x\n")
    with pytest.raises(UserError, match=r"dataset\.name is missing, which Half needs"):
        build_datamodule(to_plain(mine("dataset=lacking", *SMALL[4:])))


def test_an_estimators_own_draws_depend_on_seed_and_boundary_alone(mine: Any) -> None:
    def weight(seed: int, position: int) -> torch.Tensor:
        place = ("estimators", position)
        made: Any = synthetic_gradient("my_package.wrong.Random", (8,), 2, (), True, 3, seed, *place)
        return made.weight.detach().clone()

    torch.manual_seed(5)
    first = weight(1, 2)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after), "the global generator is left alone"
    assert torch.equal(weight(1, 2), first)
    assert not torch.equal(weight(1, 3), first)
    assert not torch.equal(weight(2, 2), first)


def test_a_strategy_and_a_data_set_are_run(mine: Any, tmp_path: Path) -> None:
    ours = ("strategy=delayed", "strategy.stages=4", "strategy.microbatches=1", "strategy.backward=replayed")
    for name, strategy in {
        "ours": ours,
        "same": ("strategy=replay",),
        "other": ("strategy=backprop",),
    }.items():
        start_module.run(mine("dataset=moons", *SMALL[4:], *strategy), tmp_path / name)
    found = {name: metrics(tmp_path / name) for name in ("ours", "same", "other")}
    assert found["same"]["run/status"] == "finished"
    assert found["same"]["run/stages"] == 4
    assert found["same"]["test/loss"] == found["ours"]["test/loss"] != found["other"]["test/loss"]


def test_a_strategy_from_outside_is_placed_and_resumed_like_ours(mine: Any, tmp_path: Path) -> None:
    replay = ("dataset=moons", *SMALL[4:], "strategy=replay")
    start_module.run(mine(*replay, "trainer.max_epochs=3"), tmp_path / "straight")
    start_module.run(mine(*replay, "trainer.devices=2"), tmp_path / "two")
    ckpt = f"ckpt={tmp_path / 'two' / 'checkpoints' / 'last.ckpt'}"
    start_module.run(mine(*replay, "trainer.max_epochs=3", ckpt), tmp_path / "on")
    assert metrics(tmp_path / "on")["val/loss"] == metrics(tmp_path / "straight")["val/loss"]


WRONG = {
    "model.dynamics=eulr": r"model\.dynamics=eulr .*did you mean euler.*package\.module\.Class",
    "model.dynamics=my_package..Midpoint": r"model\.dynamics=my_package\.\.Midpoint is not allowed",
    "strategy.estimator.name=mpl": r"strategy\.estimator\.name=mpl .*did you mean mlp",
    "model.dynamics=my_package.dynamics.Midpont": r"model\.dynamics=.*cannot be imported .*Midpont.*PYTHONPATH",
    "model.dynamics=nowhere.Midpoint": r"model\.dynamics=nowhere\.Midpoint cannot be imported",
    "model.dynamics=my_package.wrong.Still": r"does not define step",
    "model.dynamics=my_package.data.Moons": r"is no subclass of sglight\.networks\.dynamics\.Dynamics",
    "strategy.estimator.name=my_package.dynamics.Midpoint": r"strategy\.estimator\.name=.* is no subclass of",
    "strategy._target_=my_package.dynamics.Midpoint": r"strategy\._target_=.* is no subclass of",
    "dataset=half": r"dataset\._target_=my_package\.wrong\.Half lacks batch_size, train_size, val_size, test_size",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(mine: Any, override: str) -> None:
    def build(*overrides: str) -> None:
        plain = to_plain(mine(*overrides))
        build_module(plain, build_datamodule(plain))

    small = SMALL[4:] if override.startswith("dataset") else SMALL
    with pytest.raises(UserError, match=WRONG[override]):
        build(*small, "strategy=dni", override)


def test_all_four_at_once_by_the_command_on_two_workers(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    done = subprocess.run(
        [
            sys.executable, "-m", "sglight", "--config-dir", "my_conf", "-m", "seed=1,2", "dataset=moons",
            "model=midpoint", "strategy=mine", *SMALL[4:], "trainer.devices=2", "hydra.sweep.dir=runs",
            "hydra.sweep.subdir=${seed}",
        ],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in (1, 2):
        found = metrics(folder / "runs" / str(seed))
        assert (found["run/seed"], found["run/workers"], found["run/stages"]) == (seed, 2, 2)
        assert 0 <= found["test/acc"] <= 1
