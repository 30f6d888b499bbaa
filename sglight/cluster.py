"""Workers that torchrun or Slurm's srun has started: what they are called, and how they go on after a failure.

Imports no torch. A step of srun is made to look like torchrun's workers, so that nothing else need know of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from tempfile import gettempdir

from sglight.config.checks import TORCHRUN

PORTS = range(15000, 25000)


def rank() -> int:
    """Which of the processes that were started elsewhere this is; 0 for one that was not."""
    return int(os.environ["RANK"]) if TORCHRUN in os.environ else 0


def adopt_slurm() -> None:
    """Set the variables that torchrun would, if this process is one of several tasks of a step of srun's."""
    if TORCHRUN not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.update(as_torchrun(os.environ))


def as_torchrun(slurm: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from srun's; where to meet may be given by MASTER_ADDR and MASTER_PORT."""
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
    """The first of a list of nodes as Slurm writes it: ``gpu03`` of ``gpu[03-05,09],login``."""
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).partition(",")[0]


def tasks_by_node(tasks: str) -> list[int]:
    """How many tasks each node has, from ``2(x3),1`` for 2, 2, 2, 1."""
    counts = [part.rstrip(")").partition("(x") for part in tasks.split(",")]
    return list(chain.from_iterable(repeat(int(count), int(times or 1)) for count, _, times in counts))


def note_run(folder: Path) -> None:
    """Leave a note of the folder of the run that this process begins, for those that torchrun starts in its place."""
    if TORCHRUN in os.environ:
        _note().write_text(str(folder.resolve()))


def forget_run() -> None:
    """Remove the note: the run has ended."""
    if TORCHRUN in os.environ:
        _note().unlink(missing_ok=True)


def continued(words: Sequence[str]) -> list[str]:
    """The words of a command that torchrun starts again, such that it goes on with its run, from the last checkpoint.

    Only the first worker has a folder; the others do as it does.
    """
    if TORCHRUN not in os.environ or rank() > 0:
        return list(words)
    note = _note()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        note.unlink(missing_ok=True)  # of an earlier process with this one's number
    if not note.is_file() or note.stat().st_uid != os.getuid():
        return list(words)
    folder = Path(note.read_text())
    last = folder / "checkpoints" / "last.ckpt"
    own = {"hydra.run.dir": folder}
    if (
        last.is_file() and last.stat().st_mtime >= note.stat().st_mtime
    ):  # not of another run in the same folder
        own["ckpt"] = folder
    kept = [word for word in words if word.partition("=")[0] not in own]
    return [*kept, *(f"{key}={_quoted(str(path))}" for key, path in own.items())]


def _note() -> Path:
    """A file for the processes of one agent of torchrun's, their parent."""
    return Path(gettempdir()) / f"sglight-{os.getuid()}-{os.getppid()}-{os.environ[TORCHRUN]}"


def _quoted(text: str) -> str:
    """As Hydra reads a value that may hold anything."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
