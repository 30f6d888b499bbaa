"""Whole runs on several workers: results, resumption, sweeps, torchrun, and the ways in which they can end."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from tests.commands import Command, Forked, run_torchrun
from tests.strategies.common import assert_equal

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes through /proc"),
]

SMALL = (
    "dataset=ellipse", "dataset.train_points=90", "dataset.val_points=30", "dataset.test_points=30",
    "dataset.batch_size=10", "model.channels=4", "model.steps=4", "strategy=dni", "strategy.stages=4",
    "trainer.accelerator=cpu",
    "trainer.threads=1", "callbacks.progress.enabled=false",
)  # fmt: skip
TIMES = ("time/", "worker_", "speedup/", "throughput/", "memory/", "run/workers", "run/config_hash")
END_S = 30  # 15 s are promised; a loaded machine may take longer to say so


Start = Callable[..., Command]


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    """Commands of which nothing is left behind the test."""
    started: list[Command] = []
    yield started
    for command in started:
        command.clear()


@pytest.fixture
def sglight(tmp_path: Path, commands: list[Command]) -> Start:
    """``sglight(*overrides)`` starts a small run."""

    def start(*arguments: str, kind: type[Command] = Forked, **env: str) -> Command:
        commands.append(kind(*arguments[:1], *SMALL, *arguments[1:], cwd=tmp_path, **env))
        return commands[-1]

    return start


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return {name: value for name, value in found.items() if not name.startswith(TIMES)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return found


def assert_same(a: Path, b: Path) -> None:
    assert metrics(a) == metrics(b)
    assert_equal(weights(a), weights(b))


def succeeds(command: Command) -> str:
    status, out, err = command.end()
    assert status == 0, err
    return out


def test_a_sweep_over_placements_gives_the_same_everywhere(sglight: Start, tmp_path: Path) -> None:
    command = sglight(
        "-m", "trainer.devices=2,1", "trainer.max_epochs=3", "callbacks.stability.enabled=true",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )  # fmt: skip
    out = succeeds(command)
    folders = sorted((tmp_path / "sweep").glob("[01]-*"))
    assert len(folders) == 2
    for folder, workers in zip(folders, (2, 1), strict=True):
        assert json.loads((folder / "metrics.json").read_text())["run/workers"] == workers
        assert_same(folder, folders[0])
        assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        assert json.loads((folder / "timeline.json").read_text())["traceEvents"]
        for figure in ("timeline", "stability", "gradient_quality"):
            assert (folder / f"figures/{figure}.png").stat().st_size > 1000
    assert out.count(": test accuracy ") == 2  # a line a job, printed by its first worker only
    both = json.loads((folders[0] / "metrics.json").read_text())
    assert {
        f"worker_{r}/{kind}_s" for r in (0, 1) for kind in ("busy", "waiting", "communicating")
    } <= both.keys()
    assert both["stability/flow_sigma_max"] > 0  # the same everywhere, as `assert_same` says
    assert both["memory/peak_bytes"] == max(both[f"memory/worker_{r}_peak_bytes"] for r in (0, 1))
    assert command.no_process_is_left()
    best = folders[1] / "checkpoints/best.ckpt"
    succeeds(sglight("mode=test", f"ckpt={best}", "trainer.devices=2", f"hydra.run.dir={tmp_path}/test"))
    assert metrics(tmp_path / "test")["test/acc"] == metrics(folders[0])["test/acc"]


def listening(pid: int) -> set[str]:
    """Addresses at which a process listens, as in /proc/net/tcp."""
    inodes = {os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir() if f.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].rpartition(":")[0])
    return found


@pytest.mark.parametrize(
    ("number", "cause", "strategy", "replicas", "name"),
    [
        (signal.SIGKILL, "was killed by SIGKILL", "delayed", 2, "stages 0-3, replica 1"),
        (signal.SIGSTOP, "hangs", "dni", 1, "stages 2-3"),
    ],
)
def test_a_worker_that_dies_or_hangs_ends_the_run_which_goes_on_from_its_checkpoint(
    sglight: Start,
    tmp_path: Path,
    number: signal.Signals,
    cause: str,
    strategy: str,
    replicas: int,
    name: str,
) -> None:
    folder, strategy = tmp_path / "run", f"strategy={strategy}"
    command = sglight(
        strategy, "trainer.devices=2", f"trainer.replicas={replicas}", "trainer.max_epochs=100000",
        f"hydra.run.dir={folder}",
    )  # fmt: skip
    command.wait_until((folder / "checkpoints/last.ckpt").exists)
    workers = command.workers()
    assert len(workers) == 2
    assert set().union(*map(listening, workers)) <= {"0100007F"}
    os.kill(workers[1], number)
    began = time.monotonic()
    status, _, err = command.end()
    assert time.monotonic() - began < END_S
    assert status == 1
    assert f"error: worker 1 ({name}) {cause}" in err
    assert re.search("batch|validation", err)  # where it was
    assert "Traceback" not in err
    assert command.no_process_is_left()
    epochs = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["epoch"] + 1
    again = sglight(
        strategy,
        "trainer.devices=1",
        "trainer.replicas=1",
        f"trainer.max_epochs={epochs + 1}",
        "ckpt=last",
        f"hydra.run.dir={folder}",
    )
    succeeds(again)
    assert metrics(folder)["run/epochs"] == epochs + 1


def test_a_worker_that_raises_is_named_with_its_cause(sglight: Start, tmp_path: Path) -> None:
    command = sglight("trainer.devices=2", "strategy._target_=tests.failing.FailingDNI")
    status, _, err = command.end()
    assert status == 1
    assert "error: worker 1 (stages 2-3) raised ArithmeticError: this is the bug during batch 3" in err
    assert err.count("Traceback") == 1  # the one of the worker that failed
    assert "in training_step" in err
    assert command.no_process_is_left()


def test_preparing_data_may_stand_still(sglight: Start, tmp_path: Path) -> None:
    slow = (
        "dataset._target_=tests.failing.SlowToPrepare",
        "trainer.idle_timeout_s=2",
        "trainer.max_epochs=1",
    )
    succeeds(sglight("trainer.devices=2", *slow, SGLIGHT_PREPARED=str(tmp_path / "flag")))


def test_a_mistake_is_told_once_in_a_sentence(sglight: Start, tmp_path: Path) -> None:
    data = tmp_path / "broken.h5"
    data.write_bytes(b"nothing")
    status, _, err = sglight("trainer.devices=2", "model.opening=pad", "model.channels=1").end()
    assert status == 1
    assert err.count("error:") == 1
    assert "model.opening=pad" in err
    assert "Traceback" not in err


def test_ctrl_c_ends_all(sglight: Start, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = ("trainer.devices=2", "trainer.max_epochs=100000", f"hydra.run.dir={folder}")
    command = sglight(*run, kind=Command)
    command.wait_until((folder / "checkpoints/last.ckpt").exists)
    os.killpg(command.pid, signal.SIGINT)
    began = time.monotonic()
    status, _, err = command.end()
    assert time.monotonic() - began < END_S
    assert status == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert command.no_process_is_left()
    torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def test_the_command_killed_takes_its_workers_along(sglight: Start, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = sglight("trainer.devices=2", "trainer.max_epochs=100000", f"hydra.run.dir={folder}")
    command.wait_until((folder / "checkpoints/last.ckpt").exists)
    os.kill(command.pid, signal.SIGKILL)
    assert command.no_process_is_left()


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two workers of this machine, each a replica; what it has said is in ``out.txt``."""
    folder = tmp_path_factory.mktemp("replicated")
    replicas = ("trainer.replicas=2", "trainer.max_epochs=3", f"hydra.run.dir={folder}/run")
    out = succeeds(Command(*SMALL, *replicas, "trainer.show_schedule=true", cwd=folder))
    (folder / "run/out.txt").write_text(out)
    return folder / "run"


@pytest.mark.slow
def test_a_run_shows_its_replicas(replicated: Path) -> None:
    out = (replicated / "out.txt").read_text()
    assert re.search("dni, .*4 stages, lag 1; 2 replicas", " ".join(out.split()))
    assert re.search(r"^ *3 +0, 1 ", out, re.MULTILINE)  # the last stage is on both workers
    assert "1 worker in each of 2 replicas, 4 stages, lag 1" in out
    found = json.loads((replicated / "metrics.json").read_text())
    assert (found["run/replicas"], found["run/workers"]) == (2, 2)
    assert found["speedup/theoretical"] == pytest.approx(2)
    events = json.loads((replicated / "timeline.json").read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["worker 0: stages 0-3, replica 0", "worker 1: stages 0-3, replica 1"]


@pytest.mark.slow
def test_two_machines_by_torchrun(replicated: Path, commands: list[Command], tmp_path: Path) -> None:
    # The stages of a replica are on two machines, its replicas on one.
    common = (*SMALL, "trainer.max_epochs=3", "trainer.replicas=2", "trainer.layout=replicas")
    port = 20000 + os.getpid() % 20000
    agents = [
        Forked(
            "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2", "--master-addr=127.0.0.1",
            f"--master-port={port}", "--module", "sglight", *common, "trainer.num_nodes=2", "trainer.devices=2",
            f"hydra.run.dir={tmp_path}/four", cwd=tmp_path, main=run_torchrun,
            GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
        )
        for node in range(2)
    ]  # fmt: skip
    commands += agents
    for agent in agents:
        succeeds(agent)
    assert_same(tmp_path / "four", replicated)
    assert json.loads((tmp_path / "four/metrics.json").read_text())["run/workers"] == 4
    # Nobody but worker 0 has left anything.
    assert {p.name for p in tmp_path.iterdir()} == {"four"}


class KilledOnce(Callback):
    """Of the workers that torchrun starts first the second is killed in the third epoch; the first notes all epochs."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        starts, epoch = os.environ["TORCHELASTIC_RESTART_COUNT"], trainer.current_epoch
        if trainer.global_rank == 0:
            with Path("epochs.txt").open("a") as file:
                file.write(f"{starts}:{epoch} ")
        elif (starts, epoch) == ("0", 2):
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_torchrun_starts_a_run_again_which_goes_on_from_its_checkpoint(
    replicated: Path, tmp_path: Path
) -> None:
    agent = Command(
        "--standalone", "--nproc-per-node=2", "--max-restarts=1", "--module", "sglight", *SMALL,
        "trainer.replicas=2", "trainer.max_epochs=3", "+callbacks.killed._target_=tests.test_workers.KilledOnce",
        f"hydra.run.dir={tmp_path}/run", cwd=tmp_path, program=("-m", "torch.distributed.run"), OMP_NUM_THREADS="1",
    )  # fmt: skip
    succeeds(agent)
    epochs = (tmp_path / "epochs.txt").read_text().split()
    # The first worker may have been killed before it began the third epoch.
    assert epochs in (
        ["0:0", "0:1", "0:2", "1:2"],
        ["0:0", "0:1", "1:2"],
        ["0:0", "0:1", "0:2", "1:1", "1:2"],
    )
    # What is measured in a few batches only may have been in those before.
    assert metrics(tmp_path / "run").items() <= metrics(replicated).items()
    assert_equal(weights(tmp_path / "run"), weights(replicated))
    assert agent.no_process_is_left()


@pytest.mark.slow
def test_a_divergence_under_torchrun_ends_all_workers_with_one_sentence(
    commands: list[Command], tmp_path: Path
) -> None:
    agent = Forked(
        "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--nproc-per-node=2", "--module", "sglight", *SMALL,
        "strategy=delayed", "trainer.devices=2",
        "strategy.optimizer.name=sgd", "strategy.optimizer.lr=1e6", f"hydra.run.dir={tmp_path}/run", cwd=tmp_path,
        main=run_torchrun, OMP_NUM_THREADS="1",
    )  # fmt: skip
    commands.append(agent)
    code, _, err = agent.end()
    assert code != 0
    assert err.count("error: the loss is nan") == 1, err
    assert "PeerLost" not in err
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "diverged"
    assert metrics(tmp_path / "run")["run/monitored"] is None
    assert agent.no_process_is_left()


@pytest.mark.slow
def test_two_machines_by_srun(replicated: Path, tmp_path: Path) -> None:
    step = {
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "127.0.0.1,nowhere", "SLURM_NTASKS": "2",
        "SLURM_JOB_NAME": "test", "SLURM_NODELIST": "127.0.0.1,nowhere", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    tasks = [
        Command(
            *SMALL, "trainer.max_epochs=3", "trainer.replicas=2", "trainer.num_nodes=2", "trainer.devices=1",
            f"hydra.run.dir={tmp_path}/two", cwd=tmp_path, SLURM_PROCID=str(task), SLURM_NODEID=str(task), **step,
        )
        for task in range(2)
    ]  # fmt: skip
    for task in tasks:
        succeeds(task)
    assert_same(tmp_path / "two", replicated)


def test_torchrun_must_start_as_many_as_are_asked_for(commands: list[Command], tmp_path: Path) -> None:
    agent = Command(
        "--nproc-per-node=2", "--master-port=0", "--module", "sglight", *SMALL, cwd=tmp_path,
        program=("-m", "torch.distributed.run"), OMP_NUM_THREADS="1",
    )  # fmt: skip
    commands.append(agent)
    status, _, err = agent.end()
    assert status != 0
    assert err.count("torchrun has started 2 process(es), but trainer.devices=1") == 1
    assert "interrupted" not in err
