"""Workers that torchrun or Slurm's srun has started: their environment variables, and their restart after a failure.

Imports no torch. For workers of srun the environment variables of torchrun are set, so that all other code knows only
these.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from tempfile import gettempdir

from sglight.config.checks import TORCHRUN
from sglight.config.quoting import quoted

PORTS = range(15000, 25000)  # for the first worker to listen at, under Slurm


def rank() -> int:
    """The number of this process among those that torchrun started; 0 without torchrun."""
    return int(os.environ["RANK"]) if TORCHRUN in os.environ else 0


def adopt_slurm() -> None:
    """Set the environment variables of torchrun, if srun has started this process as one of several tasks."""
    if TORCHRUN not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.update(as_torchrun(os.environ))


def as_torchrun(slurm: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of torchrun, from those of srun.

    The first worker listens at the first node, or at MASTER_ADDR and MASTER_PORT if these are set.
    """
    node, job = slurm["SLURM_NODEID"], slurm.get("SLURM_JOB_ID", "0")
    step = slurm.get("SLURM_STEP_ID", "0")
    port = PORTS[
        (int(job) + 100 * int(step)) % len(PORTS)
    ]  # the same for all tasks, another one for other jobs
    return {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_by_node(slurm["SLURM_STEP_TASKS_PER_NODE"])[int(node)]),
        "GROUP_RANK": node,
        "MASTER_ADDR": slurm.get("MASTER_ADDR") or first_node(slurm["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": slurm.get("MASTER_PORT") or str(port),
        TORCHRUN: f"slurm-{job}.{step}",
    }


def first_node(nodes: str) -> str:
    """The first node of a list in Slurm's format.

    >>> first_node("gpu[03-05,09],login")
    'gpu03'
    """
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]


def tasks_by_node(tasks: str) -> list[int]:
    """The number of tasks of each node, from a list in Slurm's format.

    >>> tasks_by_node("2(x3),1")
    [2, 2, 2, 1]
    """
    counts = [part.rstrip(")").partition("(x") for part in tasks.split(",")]
    return list(chain.from_iterable(repeat(int(count), int(times or 1)) for count, _, times in counts))


def note_run(folder: Path) -> None:
    """Write the folder of this run to a file, for the process that torchrun starts if this one fails."""
    if TORCHRUN in os.environ:
        _note().write_text(str(folder.resolve()))


def forget_run() -> None:
    """Remove the file of `note_run`, because the run has ended."""
    if TORCHRUN in os.environ:
        _note().unlink(missing_ok=True)


def continued(arguments: Sequence[str]) -> list[str]:
    """The arguments with which a command continues its run after torchrun has restarted it.

    They are ``arguments`` with the folder of the run, and with ``ckpt`` if the run has left a checkpoint. Only the
    first worker has a folder, and the others follow it.
    """
    if TORCHRUN not in os.environ or rank() > 0:
        return list(arguments)
    note = _note()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        note.unlink(missing_ok=True)  # an earlier process with the same process id may have left one
    if not note.is_file() or note.stat().st_uid != os.getuid():
        return list(arguments)
    folder = Path(note.read_text())
    last = folder / "checkpoints" / "last.ckpt"
    own = {"hydra.run.dir": folder}
    # An older checkpoint is that of another run in the same folder.
    if last.is_file() and last.stat().st_mtime >= note.stat().st_mtime:
        own["ckpt"] = folder
    kept = [argument for argument in arguments if argument.partition("=")[0] not in own]
    return [*kept, *(f"{key}={quoted(str(path))}" for key, path in own.items())]


def _note() -> Path:
    """The file of `note_run`; it is named after the parent process, which is the agent of torchrun."""
    return Path(gettempdir()) / f"sglight-{os.getuid()}-{os.getppid()}-{os.environ[TORCHRUN]}"
