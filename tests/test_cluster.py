"""Workers that torchrun or srun has started."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sglight import cluster
from sglight.config.checks import TORCHRUN

SLURM = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "2", "SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[03-04,07]",
}  # fmt: skip


def test_a_task_of_srun_is_called_as_a_worker_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(SLURM))
    assert cluster.rank() == 0
    cluster.adopt_slurm()
    wanted = {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "2"}
    assert {name: os.environ[name] for name in wanted} == wanted
    assert os.environ["MASTER_ADDR"] == "gpu03"
    assert cluster.rank() == 4
    other = cluster.as_torchrun({**SLURM, "SLURM_JOB_ID": "1234568"})
    assert other["MASTER_PORT"] != os.environ["MASTER_PORT"]
    assert other[TORCHRUN] != os.environ[TORCHRUN]
    assert cluster.as_torchrun({**SLURM, "MASTER_ADDR": "here", "MASTER_PORT": "7"})["MASTER_PORT"] == "7"


def test_a_single_task_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}
    monkeypatch.setattr(os, "environ", dict(alone))
    cluster.adopt_slurm()
    assert os.environ == alone


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("a[007-9],b", "a007"),
        ("n[2,5]", "n2"),
        ("r[1-2]c[3-4]", "r1c3"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert cluster.first_node(nodes) == first


def test_tasks_by_node() -> None:
    assert cluster.tasks_by_node("4") == [4]
    assert cluster.tasks_by_node("2(x3),1") == [2, 2, 2, 1]


def test_a_command_that_is_started_again_goes_on_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "gettempdir", lambda: str(tmp_path))
    words, folder = ["seed=2", "ckpt=elsewhere"], tmp_path / "it's a run"
    cluster.note_run(folder)
    assert cluster.continued(words) == words  # not by torchrun
    for name, value in ((TORCHRUN, "x"), ("RANK", "0"), ("TORCHELASTIC_RESTART_COUNT", "1")):
        monkeypatch.setenv(name, value)
    assert cluster.continued(words) == words  # it has never begun
    last = folder / "checkpoints/last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    os.utime(last, (time.time() - 60,) * 2)  # of an earlier run in the same folder
    cluster.note_run(folder)
    assert cluster.continued(words) == [*words, f'hydra.run.dir="{folder}"']
    os.utime(last, (time.time() + 60,) * 2)
    assert cluster.continued(words) == ["seed=2", f'hydra.run.dir="{folder}"', f'ckpt="{folder}"']
    monkeypatch.setenv("RANK", "1")
    assert cluster.continued(words) == words
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert cluster.continued(words) == words
    assert list(tmp_path.iterdir()) == [folder]
