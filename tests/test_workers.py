"""Whole runs on several workers: results, resumption, sweeps, torchrun, and the ways in which they can end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch

from tests.conftest import ROOT

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


class Command:
    """`python -m sglight ...` with a mark in its environment, by which all of its processes are found."""

    def __init__(
        self, *arguments: str, cwd: Path, program: tuple[str, ...] = ("-m", "sglight"), **env: str
    ) -> None:
        self.mark = uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=cwd,
            env={**os.environ, "SGLIGHT_MARK": self.mark, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self, timeout_s: float = 120) -> tuple[int, str, str]:
        """Status, output and errors."""
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def processes(self) -> dict[int, int]:
        """All of its processes, with their parents."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
        return found

    def workers(self) -> list[int]:
        """The workers by rank: forked from a server that the command has started."""
        found = self.processes()
        servers = [pid for pid, parent in found.items() if parent == self.process.pid]
        return sorted(pid for pid, parent in found.items() if parent in servers)

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = 150) -> Any:
        """What the condition gives, once that is true."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return found

    def no_process_is_left(self) -> bool:
        """Whether all have gone, at once or soon."""
        deadline = time.monotonic() + 5
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.processes()


@pytest.fixture
def sglight(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """``sglight(*overrides)`` starts a small run; whatever is left of it at the end is killed."""
    started: list[Command] = []

    def start(*arguments: str, **env: str) -> Command:
        started.append(Command(*arguments[:1], *SMALL, *arguments[1:], cwd=tmp_path, **env))
        return started[-1]

    yield start
    for command in started:
        for pid in command.processes():
            os.kill(pid, signal.SIGKILL)
        command.process.wait()


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
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def succeeds(command: Command) -> str:
    status, out, err = command.end()
    assert status == 0, err
    return out


def test_a_sweep_over_placements_gives_the_same_everywhere(
    sglight: Callable[..., Command], tmp_path: Path
) -> None:
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
    assert out.count("test accuracy") == 2  # printed by the first worker of each only
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
    sglight: Callable[..., Command],
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


def test_a_worker_that_raises_is_named_with_its_cause(
    sglight: Callable[..., Command], tmp_path: Path
) -> None:
    command = sglight("trainer.devices=2", "strategy._target_=tests.failing.FailingDNI")
    status, _, err = command.end()
    assert status == 1
    assert "error: worker 1 (stages 2-3) raised ArithmeticError: this is the bug during batch 3" in err
    assert err.count("Traceback") == 1  # the one of the worker that failed
    assert "in training_step" in err
    assert command.no_process_is_left()


def test_preparing_data_may_stand_still(sglight: Callable[..., Command], tmp_path: Path) -> None:
    slow = (
        "dataset._target_=tests.failing.SlowToPrepare",
        "trainer.idle_timeout_s=2",
        "trainer.max_epochs=1",
    )
    succeeds(sglight("trainer.devices=2", *slow, SGLIGHT_PREPARED=str(tmp_path / "flag")))


def test_a_mistake_is_told_once_in_a_sentence(sglight: Callable[..., Command], tmp_path: Path) -> None:
    data = tmp_path / "broken.h5"
    data.write_bytes(b"nothing")
    status, _, err = sglight("trainer.devices=2", "model.opening=pad", "model.channels=1").end()
    assert status == 1
    assert err.count("error:") == 1
    assert "model.opening=pad" in err
    assert "Traceback" not in err


def test_ctrl_c_ends_all(sglight: Callable[..., Command], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = sglight("trainer.devices=2", "trainer.max_epochs=100000", f"hydra.run.dir={folder}")
    command.wait_until((folder / "checkpoints/last.ckpt").exists)
    os.killpg(command.process.pid, signal.SIGINT)
    began = time.monotonic()
    status, _, err = command.end()
    assert time.monotonic() - began < END_S
    assert status == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert command.no_process_is_left()
    torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def test_the_command_killed_takes_its_workers_along(sglight: Callable[..., Command], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = sglight("trainer.devices=2", "trainer.max_epochs=100000", f"hydra.run.dir={folder}")
    command.wait_until((folder / "checkpoints/last.ckpt").exists)
    command.process.kill()
    assert command.no_process_is_left()


@pytest.fixture(scope="module")
def replicated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two workers of this machine, each a replica."""
    folder = tmp_path_factory.mktemp("replicated")
    replicas = ("trainer.replicas=2", "trainer.max_epochs=3", f"hydra.run.dir={folder}/run")
    succeeds(Command(*SMALL, *replicas, cwd=folder))
    return folder / "run"


@pytest.mark.slow
def test_two_machines_by_torchrun(replicated: Path, tmp_path: Path) -> None:
    # The stages of a replica are on two machines, its replicas on one.
    common = (*SMALL, "trainer.max_epochs=3", "trainer.replicas=2", "trainer.layout=replicas")
    port = 20000 + os.getpid() % 20000
    agents = [
        Command(
            "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2", "--master-addr=127.0.0.1",
            f"--master-port={port}", "--module", "sglight", *common, "trainer.num_nodes=2", "trainer.devices=2",
            f"hydra.run.dir={tmp_path}/four", cwd=tmp_path, program=("-m", "torch.distributed.run"),
            GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
        )
        for node in range(2)
    ]  # fmt: skip
    for agent in agents:
        succeeds(agent)
    assert_same(tmp_path / "four", replicated)
    assert json.loads((tmp_path / "four/metrics.json").read_text())["run/workers"] == 4
    # Nobody but worker 0 has left anything.
    assert {p.name for p in tmp_path.iterdir()} == {"four"}


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


def test_torchrun_must_start_as_many_as_are_asked_for(
    sglight: Callable[..., Command], tmp_path: Path
) -> None:
    agent = Command(
        "--nproc-per-node=2", "--master-port=0", "--module", "sglight", *SMALL, cwd=tmp_path,
        program=("-m", "torch.distributed.run"), OMP_NUM_THREADS="1",
    )  # fmt: skip
    status, _, err = agent.end()
    assert status != 0
    assert "torchrun has started 2 process(es), but trainer.devices=1" in err
