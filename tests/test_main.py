"""The command: help, mistakes in one sentence, failing jobs, Ctrl-C, from anywhere."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import sglight.__main__ as command
from sglight import signals, status
from sglight.commandline import python
from sglight.config.checks import TORCHRUN
from sglight.config.completed import config_hash
from sglight.config.composing import CONF, check, to_plain
from sglight.errors import Diverged, Terminated, UserError
from sglight.report.runs import find_runs

RUNS = [sys.executable, "-m", "sglight"]


def start(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | env
    return subprocess.run(
        [*RUNS, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture
def call(monkeypatch, tmp_path, capfd):
    """The command in this process, in `tmp_path`, with `run` instead of an experiment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def called(*arguments: str, run=lambda cfg: 0.5) -> SimpleNamespace:
        monkeypatch.setattr(command.start, "run", run)
        monkeypatch.setattr(sys, "argv", ["sglight", *arguments])
        GlobalHydra.instance().clear()
        status: object = 0
        try:
            command.main()
        except SystemExit as end:
            status = end.code
        out, err = capfd.readouterr()
        if isinstance(status, str):  # Python itself prints the text and ends with status 1
            status, err = 1, f"{err}{status}\n"
        return SimpleNamespace(status=status, out=out, err=err)

    return called


def fail(error: BaseException, when=lambda cfg: True):
    """A run that raises `error` where `when` is true of its config."""

    def run(cfg):
        if when(cfg):
            raise error
        return 1.0

    return run


def test_help_is_quick_and_says_what_there_is(tmp_path):
    done = start("--help", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert done.stdout.count("python -m sglight ") >= 6, "the usage and five examples"
    for word in (
        "hamiltonian",
        "mnist_conv",
        "backprop, blend, delayed, dni, local, multilevel",
        "overfit",
        "strategy.stages",
        "seed",
        "data_dir",
    ):
        assert word in done.stdout
    assert "base_" not in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not imported & {"torch", "pytorch_lightning", "matplotlib", "sklearn"}, "they take seconds"


def examples() -> list[str]:
    """The arguments of the commands in the help, without the explanations behind them."""
    lines = (CONF / "hydra" / "help" / "sglight.yaml").read_text().splitlines()
    found = [re.match(r" +python -m sglight(.*)", line) for line in lines]
    commands = [
        re.split(r" {2,}", match[1].strip())[0] if match[1][:2] != "  " else "" for match in found if match
    ]
    return [command for command in commands if "ckpt" not in command]


@pytest.mark.parametrize("arguments", examples())
def test_examples_in_the_help_compose(compose_config, arguments):
    given = [word for word in arguments.split() if word != "-m"]
    check(compose_config(*(re.sub(r"=([^=,]*),.*", r"=\1", word) for word in given)))


def test_the_config_prints_from_any_directory(tmp_path):
    done = start("--cfg", "job", "model=leapfrog", cwd=tmp_path)
    assert done.returncode == 0
    assert "dynamics: leapfrog" in done.stdout


MISTAKES = {
    "model.stpes=3": "model.stpes is unknown; did you mean model.steps?",
    "modle=resnet": "modle is unknown; did you mean model?",
    "experment=x": "experment is unknown; did you mean experiment or export?",
    "model=resent": "model=resent is unknown; did you mean resnet? (one of antisymmetric,",
    "experiment=mnist_dens": "experiment=mnist_dens is unknown; did you mean mnist_dense?",
    "experiment=sweep/dept": "experiment=sweep/dept is unknown; did you mean sweep/depth? (one of sweep/depth,",
    "dataset=cifar": "did you mean cifar10?",
    "model.dynamics=eulr": "model.dynamics=eulr is not allowed; did you mean euler?",
    "mode=tset": "mode=tset is not allowed; did you mean test?",
    "max_epochs=3": "max_epochs is unknown; did you mean trainer.max_epochs?",
    "dataset.batch_size=abc": "dataset.batch_size=abc is not allowed; it must be a whole number",
    "seed=null": "seed=null is not allowed; it must be a whole number",
    "trainer.enable_progress_bar=yess": "it must be true or false",
    "trainer.limit_val_batches=x": "it must be a whole number, a number or null",
    "strategy.optimizer.betas=3": "it must be a list, as [1,2], each entry a number",
    "strategy.optimizer=adam": "set its keys instead: strategy.optimizer.name,",
    "strategy=null": "strategy=null is not allowed; choose one of backprop, blend, delayed, dni, local, multilevel",
    "~model": "model has no value; give one with model=...",
    "model.steps.x=3": "model.steps is a value and has no keys of its own",
    "dataset.raw_dir=x": "dataset.raw_dir is a key of dataset=cifar10,",
    "trainer.gradient_clip_val=1": "use strategy.clip_norm",
    "trainer.strategy=ddp": "trainer.strategy cannot be set",
    "hydra.run.dri=x": "did you mean hydra.run.dir?",
    "seed=1,2": "seed=1,2 gives several values; add -m",
    "seed": "seed is not of the form key=value",
    "a b": "a b is not of the form key=value",
    "ckpt=epoch=3.ckpt": "put the value in quotes: 'ckpt=\"epoch=3.ckpt\"'",
    "+model.steps=3": "model.steps is there already; write it without the +",
    "+model=resnet": "model is chosen already; write it without the +",
    "strategy.stages=99": "strategy.stages=99 is more than the network's 8 time steps",
    "model=[resnet]": "model=[resnet] is a list, but there is one model; write model=resnet",
    "+strategy.slak=2": "strategy.slak is unknown; did you mean strategy.slack?",
    "+dataset.foo=2": "dataset.foo is unknown; the keys here are",
    "hydra/launcher=joblib": "hydra/launcher=joblib is not installed; install it with pip install 'sglight[joblib]'",
    "data_dir=/a/b,c": "put a path with a comma in quotes: 'data_dir=\"/a/b,c\"'",
    "--multirn": "--multirn is unknown; did you mean --multirun?",
    "strategy.optimizer.momentum=0.5": "momentum=0.5 has no effect with strategy.optimizer.name=adam; leave it out",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_leaves_nothing(call, tmp_path, mistake):
    done = call(mistake)
    assert done.status == 1
    assert done.err.startswith("error: ")
    assert MISTAKES[mistake] in done.err
    assert len(done.err.splitlines()) == 1
    assert "use +" not in done.err
    assert not done.out
    assert not list(tmp_path.iterdir())


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = start("model.stpes=3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: model.stpes is unknown; did you mean model.steps?\n"


def test_full_errors_on_request(tmp_path):
    assert "Traceback" in start("model.stpes=3", cwd=tmp_path, HYDRA_FULL_ERROR="1").stderr


def test_a_mistake_in_the_users_own_file_names_the_file(call, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nmodel: {stpes: 3}\n")
    done = call("--config-dir", "conf", "experiment=mine")
    assert done.status == 1
    assert (
        "model.stpes is unknown; did you mean model.steps? (in the config file experiment/mine.yaml)"
        in done.err
    )


def test_the_run_gets_the_checked_config(call, tmp_path):
    seen = []
    done = call("dataset=ellipse", "data_dir=store", run=lambda cfg: seen.append(cfg) or 0.9)
    assert done.status == 0
    assert seen[0].data_dir == str(tmp_path / "store")
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert folder.name.endswith("-ellipse-hamiltonian-delayed-seed1")


def test_a_users_mistake_in_the_run_is_one_sentence(call):
    done = call(run=fail(UserError("dataset.raw_dir=x has no train-images")))
    assert done.status == 1
    assert done.err == "error: dataset.raw_dir=x has no train-images\n"


def test_a_folder_that_cannot_be_written_is_named(call, tmp_path):
    (tmp_path / "outputs").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").touch()
    for words, sentence in (
        ([], "outputs is a broken link; remove it, or give another hydra.run.dir"),
        (["-m", "seed=1,2"], "outputs is a broken link; remove it, or give another hydra.sweep.dir"),
        (["hydra.run.dir=run"], "run/checkpoints is not a folder; remove it, or give another hydra.run.dir"),
        (["hydra.run.dir=file/x"], "file is not a folder; remove it, or give another hydra.run.dir"),
        (
            ["hydra.run.dir=/proc/x"],
            "/proc cannot be written to (No such file or directory); give another hydra.run.dir",
        ),
    ):
        done = call(*words)
        assert (done.status, len(done.err.splitlines())) == (1, 1)
        assert sentence in done.err


@pytest.mark.parametrize(
    "word", ["~seed", "seed=${seed}", "seed=???", "seed=${oc.env:NOPE}", "hydra.run.dir=${x}",
             "hydra.run.dir=" + "x" * 300, "model.channels=" + "[" * 200 + "]" * 200],
)  # fmt: skip
def test_a_value_that_leads_nowhere_is_one_sentence(call, word):
    done = call(word)
    assert (done.status, len(done.err.splitlines())) == (1, 1)
    assert done.err.startswith("error: ")


def test_without_a_home_the_data_folder_is_named(call, monkeypatch):
    def nobody(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    assert "data_dir=~/.cache/sglight: this user has no home directory; give" in call("dataset=mnist").err
    assert call().status == 0, "the digits need none"


def test_a_job_that_diverges_is_worth_nothing_and_the_others_go_on(call, monkeypatch):
    returned, job = [], command._job
    monkeypatch.setattr(command, "_job", lambda cfg: returned.append(job(cfg)) or returned[-1])
    done = call("-m", "seed=1,2,3", run=fail(Diverged("the loss is nan"), when=lambda cfg: cfg.seed == 2))
    assert done.status == 1
    assert [value == 1.0 for value in returned] == [True, False, True] and math.isnan(returned[1])
    assert "job 1 (seed=2) diverged: the loss is nan" in done.err
    assert re.search(r"error: \S*/1-\S* diverged", done.err)


def test_a_job_in_another_process_may_diverge(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    diverging = (
        "strategy=backprop", "dataset=ellipse", "model.activation=relu", "strategy.optimizer.name=sgd",
        "strategy.optimizer.lr=1e-3,1e6", "trainer.max_epochs=1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1",
    )  # fmt: skip
    done = start("-m", *diverging, "hydra.sweep.dir=sweep", cwd=tmp_path)
    told = [json.loads(path.read_text())["status"] for path in sorted(tmp_path.glob("sweep/*/status.json"))]
    assert (done.returncode, told) == (1, ["finished", "diverged"])
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("value", "status"), [("0", 0), ("1", 0), ("true", 0), ("2", 1), ("-1", 1)])
def test_what_is_true_or_false_takes_no_other_number(call, value, status):
    done = call(f"callbacks.progress.enabled={value}")
    assert done.status == status
    assert ("callbacks.progress.enabled" in done.err) == bool(status)


@pytest.mark.parametrize("arguments", [[], ["-m", "seed=1,2"]])
def test_a_signal_ends_everything_with_its_number(call, arguments):
    calls = []

    def terminated(cfg):
        calls.append(cfg.seed)
        raise Terminated(signal.SIGTERM)

    done = call(*arguments, run=terminated)
    assert (done.status, calls) == (143, [1])
    assert "interrupted in" in done.err and "Traceback" not in done.err


def test_who_is_interrupted_hears_how_to_go_on(call, tmp_path):
    def run(cfg):
        file = Path(HydraConfig.get().runtime.output_dir, "checkpoints", "last.ckpt")
        file.parent.mkdir()
        file.touch()
        raise KeyboardInterrupt

    done = call("hydra.run.dir=a b", run=run)
    assert done.err.endswith(f"go on with: {python('sglight')} 'ckpt=\"{tmp_path}/a b\"'\n")


def test_any_other_error_keeps_its_traceback(call):
    for error in (ValueError("a bug"), RuntimeError("a bug"), KeyError("a bug")):
        with pytest.raises(type(error), match="a bug"):
            call(run=fail(error))


def test_a_refused_run_leaves_an_older_one_in_the_same_folder_as_it_was(call, tmp_path):
    call("hydra.run.dir=mine", "seed=3")
    before = {p: p.read_bytes() for p in (tmp_path / "mine").rglob("*") if p.is_file()}
    assert before
    assert call("hydra.run.dir=mine", "strategy.stages=99").status == 1
    assert {p: p.read_bytes() for p in (tmp_path / "mine").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("error", [UserError("no such file"), RuntimeError("a bug")])
def test_a_failed_job_does_not_take_the_others_down(call, tmp_path, error):
    seeds = []
    run = fail(error, when=lambda cfg: seeds.append(cfg.seed) or cfg.seed == 2)
    done = call("-m", "seed=1,2,3", run=run)
    assert done.status == 1
    assert seeds == [1, 2, 3]
    assert "job 1 (seed=2)" in done.err
    assert str(error) in done.err
    assert ("Traceback" in done.err) == isinstance(error, RuntimeError)
    assert len(list((tmp_path / "outputs" / "multirun").glob("*/*/*-digits-hamiltonian-delayed-seed?"))) == 3


def test_a_job_whose_keys_do_not_go_together_does_not_take_the_others_down(call):
    seen = []
    done = call("-m", "strategy.stages=2,99,4", run=lambda cfg: seen.append(cfg.strategy.stages) or 0.0)
    assert (done.status, seen) == (1, [2, 4])
    assert "job 1 (strategy.stages=99): strategy.stages=99 is more than" in done.err
    assert "Traceback" not in done.err


SWEEPS = {
    "depth": (["model.steps=4,64", "model=resnet"], "0-digits-resnet-backprop-seed1-steps_4", 2),
    "horizon": (["model=resnet", "model.horizon=1,3"], "0-digits-resnet-backprop-seed1-horizon_1", 2),
    "stages": ([], "3-digits-hamiltonian-dni-seed1-stages_8", 4),
    "lag": ([], "2-digits-hamiltonian-dni-seed1-lag_2", 5),
}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_has_its_jobs_which_say_what_they_are(call, tmp_path, sweep):
    overrides, name, jobs = SWEEPS[sweep]
    seen = []
    run = lambda cfg: seen.append(cfg) or 0.5  # noqa: E731
    assert call("-m", f"experiment=sweep/{sweep}", *overrides, run=run).status == 0
    assert len(seen) == len({config_hash(to_plain(cfg)) for cfg in seen}) == jobs
    folders = {folder.name for folder in tmp_path.glob("outputs/multirun/*/*/*") if folder.is_dir()}
    assert len(folders) == jobs and name in folders


def test_folders_are_named_without_paths_and_brackets(call, tmp_path):
    (tmp_path / "raw").mkdir()
    call(
        "-m",
        "dataset=mnist",
        "dataset.raw_dir=raw",
        "model.channels=[8,8]",
        "seed=1,2",
        f"data_dir={tmp_path}/store",
    )
    call("-m", "dataset=mnist", f"dataset.raw_dir={tmp_path}/raw", "trainer.max_epochs=3", "seed=4")
    names = {folder.name for folder in tmp_path.glob("outputs/multirun/*/*/*-mnist-*")}
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names), "ckpt=PATH would need quotes"
    common = "mnist-hamiltonian-delayed-seed"
    assert names == {f"{k}-{common}{k + 1}-raw_dir_raw-channels_8x8" for k in (0, 1)} | {f"0-{common}4"}


def finish(cfg):
    """A run that leaves the metrics of a finished one."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    metrics = {
        "run/status": "finished",
        "run/config_hash": config_hash(to_plain(cfg)),
        "run/monitored": cfg.seed / 8,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return cfg.seed / 8


def test_a_sweep_ends_with_one_table_and_the_command_for_more(call, tmp_path):
    def run(cfg):
        folder = Path(HydraConfig.get().runtime.output_dir)
        metrics = {"test/acc": 0.9 + cfg.seed / 100, "run/status": "finished"}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return 1.0

    done = call("-m", "strategy=backprop,dni", "seed=1,2", run=run)
    assert done.out.count("test accuracy  ") == 1 and "91.50 ± 0.71 %" in done.out
    *_, last = done.out.splitlines()
    assert last.startswith(f"report       {python('sglight.report')} {tmp_path}/outputs/multirun/")
    assert "report" not in call("seed=1", run=run).out


def test_completed_jobs_are_skipped_and_the_others_done(call, tmp_path, monkeypatch):
    call("-m", "seed=1,2", run=finish)
    seen, returned, job = [], [], command._job
    monkeypatch.setattr(command, "_job", lambda cfg: returned.append(job(cfg)) or returned[-1])

    def run(cfg):
        seen.append(cfg.seed)
        return finish(cfg)

    done = call("-m", "seed=1,2,3", "skip_completed=true", "callbacks.progress.enabled=false", run=run)
    assert (done.status, seen) == (0, [3])
    assert returned == [1 / 8, 2 / 8, 3 / 8], "what a sweeper gets, of every job"
    told = [line for line in done.out.splitlines() if line.startswith("done already in ")]
    assert len(told) == 2
    for line, seed in zip(told, (1, 2), strict=True):
        folder = Path(line.removeprefix("done already in ").partition(",")[0])
        assert f"-seed{seed}" in folder.name and (folder / "metrics.json").is_file()
        assert f"val/acc {seed / 8:g}" in line
    states = [json.loads(path.read_text())["status"] for path in tmp_path.glob("outputs/**/status.json")]
    assert states == ["skipped"] * 2  # of the others `start.run` would have said what became of them
    assert len(find_runs([tmp_path / "outputs"])) == 3, "what was skipped is no run of its own"
    sweep = max(tmp_path.glob("outputs/multirun/*/*"), key=lambda folder: folder.stat().st_mtime)
    assert len(find_runs([sweep])) == 3, "but the sweep is compared as a whole"
    assert call("seed=3", "skip_completed=true", run=run).status == 0
    assert call("seed=3", run=run).status == 0
    assert seen == [3, 3], "only when asked to"


def test_a_sweep_that_is_repeated_in_its_own_folder_goes_on_where_it_failed(call, tmp_path):
    sweep = ("-m", "seed=1,2,3", "skip_completed=true", f"hydra.sweep.dir={tmp_path}/mine")
    seen = []

    def run(cfg):
        seen.append(cfg.seed)
        if seen == [1, 2]:
            raise UserError("a full disk")
        return finish(cfg)

    assert call(*sweep, run=run).status == 1
    assert call(*sweep, run=run).status == 0
    assert seen == [1, 2, 3, 2]
    assert len(find_runs([tmp_path / "mine"])) == 3
    # `start.run`, which is not called here, would have overwritten it; a finished run stays one.
    (told,) = [json.loads(path.read_text()) for path in tmp_path.glob("mine/*/status.json")]
    assert told == {"status": "failed", "reason": "UserError: a full disk"}


def test_a_sweep_with_an_unknown_choice_is_refused_before_any_job(call):
    seen = []
    done = call("-m", "model=hamiltonian,resent", run=lambda cfg: seen.append(1) or 0.0)
    assert (done.status, seen) == (1, [])
    assert "model=resent is unknown; did you mean resnet?" in done.err.splitlines()[-1]


def test_a_sweep_without_failures_ends_well(call):
    assert call("-m", "model=resnet,leapfrog", "strategy=backprop,dni").status == 0


@pytest.mark.parametrize("arguments", [[], ["-m", "seed=1,2"]])
def test_an_interrupt_ends_everything_with_130(call, arguments):
    calls = []

    def interrupted(cfg):
        calls.append(cfg.seed)
        raise KeyboardInterrupt

    done = call(*arguments, run=interrupted)
    assert (done.status, calls) == (130, [1])
    assert "Traceback" not in done.err


def test_the_interrupt_that_lightning_turns_into_an_exit_counts_as_one(call):
    def run(cfg):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    assert call(run=run).status == 130


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="POSIX signals")
def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    code = (
        "import sys, time, types; m = types.ModuleType('sglight.experiment'); "
        "m.run = lambda *_: (print('go', flush=True), time.sleep(60)); sys.modules[m.__name__] = m; "
        "from sglight.__main__ import main; sys.argv = ['sglight']; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert re.fullmatch(r"interrupted in \S+, before the first checkpoint; begin anew .*\n", err)


@pytest.mark.parametrize("ended", [False, True])
def test_of_torchruns_workers_the_first_says_why_a_command_is_refused(call, monkeypatch, ended):
    for name, value in ((TORCHRUN, "x"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if ended:  # by torchrun, because worker 0 has ended
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(command, "sleep", sleep)
    done = call("model.stpes=3")
    assert (done.status, waits) == (1, [command.STAY_S])
    assert done.err == ("" if ended else "error: model.stpes is unknown; did you mean model.steps?\n")


def test_of_torchruns_workers_the_first_says_that_the_run_was_interrupted(call, monkeypatch):
    for name, value in ((TORCHRUN, "x"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    done = call(run=fail(Terminated(signal.SIGTERM)))
    assert (done.status, done.err) == (143, "")


def test_a_signal_behind_the_results_of_a_job_ends_the_sweep_and_says_so(call):
    ran = []

    def run(cfg):
        ran.append(Path(HydraConfig.get().runtime.output_dir))
        with status.recorded(ran[-1]):
            signals.hold()  # the results are being written
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.5

    done = call("-m", "seed=1,2,3", run=run)
    assert (done.status, len(ran), status.read(ran[0])["status"]) == (143, 1, "finished")
    assert f"interrupted behind {ran[0]}, which is finished; go on with the same command and skip" in done.err


def test_a_run_with_results_is_finished_whatever_signal_comes(call, tmp_path):
    def run(cfg):
        with status.recorded(tmp_path):
            signals.hold()
            for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signal.SIGTERM)
        return 0.5

    done = call(run=run)
    assert (done.status, done.err, status.read(tmp_path)["status"]) == (0, "", "finished")
