"""The config composes, is typed, and refuses what does not go together, by key, before torch is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from sglight.config.composing import CONF, check, to_plain
from sglight.config.finding import resolve_ckpt
from sglight.errors import UserError

GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("hydra", "dataset"))
CHOICES = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
DATASETS = sorted(file.stem for file in (CONF / "dataset").glob("*.yaml"))
STRATEGIES = ["backprop", "blend", "delayed", "dni", "local", "multilevel", "pvd"]
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def test_the_default_is_digits_with_two_stages_whose_gradients_come_late(compose_config):
    cfg = check(compose_config())
    assert (cfg.dataset.name, cfg.model.dynamics, cfg.strategy.stages) == ("digits", "hamiltonian", 2)
    assert cfg.strategy._target_.endswith("Delayed")


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_passes_the_checks(compose_config, group, choice):
    check(compose_config(f"{group}={choice}"))


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_dataset_composes(compose_config, dataset):
    assert compose_config(f"dataset={dataset}").dataset._target_.startswith("sglight.data.")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_preset_goes_with_every_strategy(compose_config, experiment, strategy):
    cfg = check(compose_config(f"experiment={experiment}", f"strategy={strategy}", "trainer.max_epochs=3"))
    assert cfg.trainer.max_epochs == 3, "the command line wins over the preset"
    assert cfg.strategy._target_.lower().endswith(strategy)


def test_a_preset_adds_its_estimator_only_for_the_strategy_that_has_one(compose_config):
    assert compose_config("experiment=mnist_conv", "strategy=dni").strategy.estimator.name == "conv"
    assert "estimator" not in compose_config("experiment=mnist_conv").strategy


@pytest.mark.parametrize("strategy", ["dni", "multilevel"])
def test_a_convolutional_network_brings_convolutional_estimators(compose_config, strategy):
    def name(*overrides):
        plain = to_plain(check(compose_config(f"strategy={strategy}", *overrides)))
        return plain["strategy"]["estimator"]["name"]

    assert name() == "mlp"
    assert name("model.kernel=conv") == "conv"
    assert name("model.kernel=conv", "strategy.estimator.name=linear") == "linear"


def test_every_key_has_a_comment():
    for file in [CONF / "config.yaml", *CONF.glob("[!deh]*/*.yaml")]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if file.name == "config.yaml" and line.startswith("hydra:"):
                break
            leaf = re.match(r"\s*[a-z_]+: \S", line) and not re.match(
                r"\s*(defaults|_target_|enabled|monitor):", line
            )
            assert not leaf or "#" in line, f"{file.name}:{number} {line}"


def test_plain_containers_have_lower_case_names_for_enums_and_no_references(compose_config):
    plain = to_plain(compose_config("seed=7"))
    assert plain["mode"] == "fit" and type(plain["mode"]) is str
    assert plain["model"]["kernel"] == "dense" and type(plain["model"]["kernel"]) is str
    assert plain["dataset"]["seed"] == 7
    assert OmegaConf.create(plain).strategy.optimizer.betas == [0.9, 0.999]


def test_skipping_is_refused_under_torchrun(compose_config, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(UserError, match=r"skip_completed=true does not go with torchrun"):
        check(compose_config("skip_completed=true"))


@pytest.mark.parametrize(
    "overrides",
    [
        ("strategy=dni", "model.channels=[4,8]", "+strategy.optimizer.kwargs={a: 1}", "seed=3"),
        ("experiment=mnist_conv", "strategy.optimizer.lr=1e-3", "callbacks.figures={enabled: false}"),
    ],
)  # fmt: skip
def test_what_tests_compose_is_what_hydra_composes(compose_config, overrides):
    whole = compose_config(*overrides, hydra=True)
    with open_dict(whole):
        del whole["hydra"]
    assert compose_config(*overrides) == whole
    assert OmegaConf.to_yaml(compose_config(*overrides)) == OmegaConf.to_yaml(whole)


def test_checking_twice_changes_nothing(compose_config):
    once = check(compose_config())
    assert check(once) == once


def test_the_checks_import_neither_torch_nor_lightning():
    code = (
        "import sys, sglight.__main__; "
        "sys.exit(bool({'torch', 'pytorch_lightning', 'h5py', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


REFUSED = {
    "points as images": (["dataset=ellipse", "model.kernel=conv"], r"model\.kernel=conv needs images"),
    "large filters": (
        ["model.kernel=conv", "model.kernel_size=9"],
        r"model\.kernel_size=9 is larger than the pictures, 8 x 8",
    ),
    "too many halvings": (
        ["model.kernel=conv", "model.channels=[8,8,8,8,8]"],
        r"images of 8x8 are too small to be halved",
    ),
    "narrow opening": (["model.opening=pad", "model.channels=4"], r"at least the input's 64"),
    "stages": (["strategy.stages=9"], r"strategy\.stages=9 .* 8 time steps"),
    "stages of all segments": (
        ["model.steps=[2,3]", "model.channels=[64,64]", "strategy.stages=6"],
        "5 time steps",
    ),
    "no stage": (["strategy.stages=0"], r"strategy\.stages=0 .* at least 1"),
    "lag": (["strategy=dni", "strategy.lag=-1"], r"strategy\.lag=-1 .* at least 0"),
    "lists": (
        ["model.steps=[4,4]", "model.channels=[8,8,8]"],
        r"model\.steps has 2 entries, .* makes 3 segments",
    ),
    "list for one": (
        ["model.horizon=[1,2]"],
        r"model\.horizon has 2 entries, .*channels=64 makes 1 segments",
    ),
    "steps": (["model.steps=0"], r"model\.steps=0 .* at least 1"),
    "steps list": (["model.steps=[4,2.5]"], r"model\.steps=\[4, 2\.5\] .* whole number"),
    "steps empty": (["model.steps="], r"model\.steps="),
    "steps true": (["model.steps=true"], r"model\.steps=True"),
    "horizon": (["model.horizon=-1"], r"model\.horizon=-1 .* greater than 0"),
    "horizon text": (["model.horizon=long"], r"model\.horizon=long"),
    "channels": (["model.channels=[]"], r"model\.channels=\[\]"),
    "head": (["model.head=pool"], r"model\.head=pool .* model\.kernel=conv"),
    "opening": (["model.opening=conv"], r"model\.opening=conv .* model\.kernel=conv"),
    "opening norm": (["model.opening_normalisation=batch"], r"needs model\.opening=conv"),
    "even filter": (["model.kernel=conv", "model.kernel_size=4"], r"model\.kernel_size=4 .* odd"),
    "reversible": (
        ["model=resnet", "model.reversible=true"],
        r"model\.reversible=true needs model=hamiltonian",
    ),
    "reversible batch": (
        ["model.reversible=true", "model.normalisation=batch"],
        r"model\.normalisation=batch",
    ),
    "gamma": (["model.gamma=0.1"], r"model\.gamma=0\.1 is for model=antisymmetric"),
    "negative gamma": (["model=antisymmetric", "model.gamma=-0.1"], r"model\.gamma=-0\.1 .* at least 0"),
    "velocity": (["model.initial_velocity=paper"], "model=leapfrog only"),
    "groups": (
        ["model.normalisation=group", "model.groups=7"],
        r"model\.groups=7 does not divide model\.channels=64",
    ),
    "estimator": (
        ["strategy=dni", "strategy.estimator.name=conv"],
        r"strategy\.estimator\.name=conv .* model\.kernel=conv",
    ),
    "estimator width": (
        ["strategy=dni", "strategy.estimator.hidden=[0]"],
        r"strategy\.estimator\.hidden=\[0\]",
    ),
    "rate": (["strategy.optimizer.lr=0"], r"strategy\.optimizer\.lr=0\.0 .* greater than 0"),
    "betas": (["strategy.optimizer.betas=[0.9]"], r"strategy\.optimizer\.betas=\[0\.9\]"),
    "clip": (["strategy.clip_norm=-1"], r"strategy\.clip_norm=-1"),
    "half precision": (
        ["trainer.precision=16-mixed"],
        r"trainer\.precision=16-mixed .* bf16-mixed or 32-true",
    ),
    "precision": (["trainer.precision=8"], r"trainer\.precision=8 .* choose one of 32-true"),
    "devices": (["trainer.devices=3"], r"trainer\.devices=3 .*3 workers, .*2 stage.* raise strategy\.stages"),
    "no late epoch": (
        ("strategy=delayed", "strategy.exact_epochs=3", "trainer.max_epochs=3"),
        r"strategy\.exact_epochs=3 leaves no epoch of trainer\.max_epochs=3 for late",
    ),
    "more pieces than samples": (
        ("strategy=backprop", "strategy.microbatches=9", "dataset.batch_size=8"),
        r"strategy\.microbatches=9 is more than dataset\.batch_size=8",
    ),
    "one piece on two workers": (
        ("strategy=backprop", "strategy.stages=2", "strategy.microbatches=1", "trainer.devices=2"),
        r"strategy\.microbatches=1 leaves all but one of 2 workers idle",
    ),
    "cuts of other stages": (
        ("strategy=dni", "strategy.stages=2", "strategy.cuts=[1,2]"),
        r"strategy\.cuts=\[1, 2\] makes 3 stages, but strategy\.stages=2",
    ),
    "workers": (
        ["strategy=backprop", "trainer.devices=2"],
        r"trainer\.devices=2 .*1 stage.* raise strategy\.stages",
    ),
    "replicas that do not divide": (
        ["trainer.replicas=2", "trainer.devices=3"],
        r"trainer\.replicas=2 does not divide the 3 worker",
    ),
    "workers of replicas": (
        ["trainer.replicas=2", "trainer.devices=6"],
        r"makes 3 workers in each of trainer\.replicas=2, .*2 stage.* raise strategy\.stages",
    ),
    "replicas without a sample": (
        ["trainer.replicas=4", "dataset.batch_size=7", "strategy.microbatches=2"],
        r"dataset\.batch_size=7 leaves some of trainer\.replicas=4 without .* raise it to 8 or more",
    ),
    "replicas of processors": (
        ["strategy=pvd", "trainer.replicas=2"],
        r"trainer\.replicas=2 does not go with strategy=pvd.* strategy\.processors",
    ),
    "processors": (["strategy=pvd", "strategy.processors=9"], r"strategy\.processors=9 .* 8 time steps"),
    "no processor": (["strategy=pvd", "strategy.processors=0"], r"strategy\.processors=0 .* at least 1"),
    "workers of processors": (
        ["strategy=pvd", "trainer.devices=3"],
        r"trainer\.devices=3 .*3 workers, .*2 processor.* raise strategy\.processors",
    ),
    "pvd with batch statistics": (
        ["strategy=pvd", "model.normalisation=batch"],
        r"model\.normalisation=batch does not go with strategy=pvd",
    ),
    "decoupled decay": (
        ["strategy=pvd", "strategy.optimizer.name=adamw", "strategy.optimizer.weight_decay=0.1"],
        r"optimizer\.name=adamw does not go with strategy=pvd.* choose adam",
    ),
    "clipped L-BFGS": (
        ["strategy=pvd", "strategy.local_solver=lbfgs", "strategy.clip_norm=1"],
        r"strategy\.clip_norm .* strategy\.local_solver=lbfgs",
    ),
    "target": (
        ["strategy=pvd", "strategy.target_accuracy=2"],
        r"strategy\.target_accuracy=2\.0 .* at most 1",
    ),
    "nodes": (["trainer.num_nodes=2"], r"trainer\.num_nodes=2 needs torchrun .*--nnodes 2"),
    "idle": (["trainer.idle_timeout_s=0"], r"trainer\.idle_timeout_s=0"),
    "timeline": (["callbacks.timeline.batches=0"], r"callbacks\.timeline\.batches=0 .* at least 1"),
    "epochs": (["trainer.max_epochs=0"], r"trainer\.max_epochs=0 .* at least 1"),
    "time": (["trainer.max_time=1h"], r"trainer\.max_time=1h .* DD:HH:MM:SS"),
    "profiler": (["trainer.profiler=x"], r"trainer\.profiler=x"),
    "part": (["trainer.limit_train_batches=1.5"], r"trainer\.limit_train_batches=1\.5"),
    "batch": (["dataset.batch_size=0"], r"dataset\.batch_size=0 .* at least 1"),
    "split": (["dataset.validation_fraction=1.0"], r"dataset\.validation_fraction=1\.0 .* less than 1"),
    "no split": (["dataset.validation_fraction=0"], r"dataset\.validation_fraction=0\.0 .* greater than 0"),
    "no memory": (["dataset.memory_limit=0"], r"dataset\.memory_limit=0\.0 .* greater than 0"),
    "loud": (["dataset=peaks", "dataset.noise=inf"], r"dataset\.noise=inf .* at most"),
    "few points": (
        ["dataset=peaks", "dataset.val_points=4"],
        r"dataset\.val_points=4 .* at least 5, a point of each",
    ),
    "many points": (
        ["dataset=peaks", "dataset.train_points=1000000000000"],
        r"train_points=1000000000000 .* at most",
    ),
    "raw_dir": (
        ["dataset=mnist", "dataset.raw_dir=/no/where"],
        r"dataset\.raw_dir=/no/where is not a folder",
    ),
    "archive": (
        ["dataset=image_folder", "dataset.archive=/no.tar"],
        r"dataset\.archive=/no\.tar is not a file",
    ),
    "no source": (["dataset=image_folder"], r"needs either dataset\.raw_dir .* or dataset\.archive"),
    "path": (["dataset=hdf5", "dataset.path=/no.h5"], r"dataset\.path=/no\.h5 is not a file"),
    "ckpt": (["ckpt=/no.ckpt"], r"ckpt=/no\.ckpt is not a file"),
    "stability": (["callbacks.stability.samples=0"], r"callbacks\.stability\.samples=0 .* at least 1"),
    "exact": (["callbacks.stability.exact_up_to=-1"], r"callbacks\.stability\.exact_up_to=-1 .* at least 0"),
    "test": (["mode=test"], r"mode=test needs a checkpoint .* ckpt=PATH"),
    "added key": (["+model.stpes=3"], r"model\.stpes is unknown; did you mean model\.steps\?"),
    "added group": (["+modle=3"], r"modle is unknown; did you mean model\?"),
    "missing": (["~dataset"], r"dataset has no value"),
    "reference": (["dataset.seed=${sede}"], r"dataset\.seed refers to \$\{sede\}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused_by_key(compose_config, case):
    overrides, sentence = REFUSED[case]
    with pytest.raises(UserError, match=sentence) as caught:
        check(compose_config(*overrides))
    assert "\n" not in str(caught.value)


ALLOWED = [
    ["model.steps=[2,3]", "model.channels=[64,64]", "model.horizon=[1,2.5]", "strategy.stages=5"],
    ["model.channels=[64,64]", "strategy.stages=16"],
    ["model=antisymmetric", "model.gamma=0.2"],
    ["model=leapfrog", "model.initial_velocity=paper", "model.reversible=true", "model.normalisation=group"],
    ["model.kernel=conv", "model.head=pool", "strategy=dni", "strategy.estimator.name=conv"],
    ["trainer.precision=bf16-mixed", "trainer.limit_train_batches=0.5", "trainer.max_time=00:00:10:00"],
    ["trainer.limit_val_batches=3", "trainer.fast_dev_run=2", "trainer.threads=2", "strategy.clip_norm=1"],
]


@pytest.mark.parametrize("overrides", ALLOWED, ids=" ".join)
def test_what_goes_together_is_allowed(compose_config, overrides):
    check(compose_config(*overrides))


def test_a_choice_may_be_the_users_own_class_with_keys_of_its_own(compose_config, tmp_path):
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "mine.yaml").write_text(
        "_target_: theirs.Strategy\nstages: 3\nsecret: {depth: 1}\n"
    )
    cfg = check(
        compose_config(f"hydra.searchpath=[file://{tmp_path}]", "strategy=mine", "strategy.secret.depth=2")
    )
    assert to_plain(cfg.strategy) == {"_target_": "theirs.Strategy", "stages": 3, "secret": {"depth": 2}}


def test_paths_count_from_the_directory_of_the_command(compose_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    cfg = check(compose_config("dataset=mnist", "dataset.raw_dir=raw", 'data_dir="~/store"'))
    assert cfg.dataset.raw_dir == str(tmp_path / "raw")
    assert cfg.dataset.data_dir == cfg.data_dir == str(Path.home() / "store")


def test_the_data_folder_comes_from_the_environment(compose_config, tmp_path, monkeypatch):
    monkeypatch.setenv("SGLIGHT_DATA_DIR", str(tmp_path))
    assert check(compose_config()).data_dir == str(tmp_path)


@pytest.fixture
def hydra_config(compose_config, tmp_path, monkeypatch):
    """Hydra as it is within a run started in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def started(*overrides: str) -> DictConfig:
        cfg = compose_config(*overrides, hydra=True)
        OmegaConf.set_readonly(cfg.hydra, False)
        cfg.hydra.runtime.cwd = str(tmp_path)
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_readonly(cfg.hydra, False)
        cfg.hydra.runtime.output_dir = cfg.hydra.run.dir
        HydraConfig.instance().set_config(cfg)
        return cfg

    yield started
    HydraConfig.instance().cfg = None


def write_checkpoint(folder: Path, age: int) -> Path:
    file = folder / "checkpoints" / "last.ckpt"
    file.parent.mkdir(parents=True)
    file.touch()
    os.utime(file, (1e9 - age, 1e9 - age))
    return file


def test_last_is_the_newest_checkpoint_of_the_same_choices(hydra_config, tmp_path):
    hydra_config("dataset=ellipse", "strategy=dni")
    day = tmp_path / "outputs" / "2026-01-01"
    write_checkpoint(day / "10-00-00-000000-ellipse-hamiltonian-dni", age=30)
    wanted = write_checkpoint(day / "09-00-00-000000-ellipse-hamiltonian-dni", age=20)
    write_checkpoint(day / "11-00-00-000000-digits-hamiltonian-dni", age=10)
    (day / "12-00-00-000000-ellipse-hamiltonian-dni-seed1").mkdir()
    assert resolve_ckpt("last") == str(wanted)
    seeded = write_checkpoint(day / "08-00-00-000000-ellipse-hamiltonian-dni-seed7", age=15)
    write_checkpoint(day / "08-00-00-000000-ellipse-hamiltonian-dnix-seed7", age=1)
    assert resolve_ckpt("last") == str(seeded)
    job = write_checkpoint(
        tmp_path / "outputs/multirun/2026-01-01/10/0-ellipse-hamiltonian-dni-seed1-lag_2", age=5
    )
    assert resolve_ckpt("last") == str(job)


def test_last_is_the_run_folders_own_checkpoint_if_it_has_one(hydra_config, tmp_path):
    hydra_config(f"hydra.run.dir={tmp_path}/mine")
    write_checkpoint(tmp_path / "outputs/2026-01-01/10-00-00-000000-digits-hamiltonian-dni", age=0)
    own = write_checkpoint(tmp_path / "mine", age=100)
    assert resolve_ckpt("last") == str(own)


def test_last_without_any_run_is_refused(hydra_config):
    hydra_config()
    with pytest.raises(UserError, match=r"ckpt=last finds no run of digits-hamiltonian-delayed"):
        resolve_ckpt("last")


def test_a_checkpoint_may_be_given_by_its_run(tmp_path):
    file = write_checkpoint(tmp_path / "run", age=0)
    assert resolve_ckpt(str(tmp_path / "run")) == str(file)
    assert resolve_ckpt(str(file)) == str(file)
    assert resolve_ckpt(None) is None


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("+callbacks.mine={rate: 1}", r"callbacks\.mine\._target_ is missing; give package\.module\.Class"),
        ("+logger.mine=3", r"logger\.mine\._target_ is missing"),
        ("~callbacks.memory", r"callbacks\.memory is missing; .* defaults: \[default, _self_\]"),
    ],
)
def test_nodes_need_a_class(compose_config, given, sentence):
    with pytest.raises(UserError, match=sentence):
        check(compose_config(given))


def test_a_missing_extra_is_one_sentence(compose_config, monkeypatch):
    monkeypatch.setattr("sglight.config.checks.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"logger=wandb needs wandb; pip install 'sglight\[wandb\]'"):
        check(compose_config("logger=[csv,wandb]"))
