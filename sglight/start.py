"""Starts a run in this process or in worker processes; imports no torch, which the workers import while they start."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sglight import cluster, signals
from sglight.compat.postponed import postpone
from sglight.config.checks import DEPLOYMENT, TORCHRUN
from sglight.config.completed import config_hash
from sglight.config.composing import EARLIER, to_plain
from sglight.config.quoting import typed
from sglight.errors import Diverged, Terminated, interruption
from sglight.files import write_atomically
from sglight.parallel import launcher
from sglight.parallel.launcher import WorkerFailed
from sglight.status import recorded

METRICS = "metrics.json"
# Variables of schedulers and launchers, from which Lightning would conclude that there are other workers.
LEFT_OVER = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_NODEID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK",
)  # fmt: skip


def run(cfg: DictConfig, folder: Path | None = None) -> float:
    """Carry out the run of a config: train and test, test only, predict or export (``mode``).

    With ``trainer.devices`` above 1 it starts that many worker processes, unless torchrun has started them.

    Args:
        cfg: the composed and checked config.
        folder: for the files of the run; by default Hydra's run folder.

    Returns:
        the monitored metric.

    Raises:
        UserError: if the config asks for something that does not exist or is not possible, or if a worker fails.
    """
    folder = Path(HydraConfig.get().runtime.output_dir) if folder is None else folder
    plain = to_plain(cfg)
    if TORCHRUN not in os.environ:
        for name in LEFT_OVER:
            os.environ.pop(name, None)
    elif cluster.rank() > 0:  # worker 0 writes the status
        return _run(plain, folder)
    brief = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    with recorded(folder, EARLIER.pop(folder.resolve(), None)):
        cluster.note_run(folder)
        earlier = _stamp(folder)
        try:
            monitored = _start(plain, folder, brief)
            signals.hold()
            cluster.forget_run()
            return monitored
        except Diverged:
            _write_diverged(plain, folder)
            raise
        except (Terminated, KeyboardInterrupt, WorkerFailed) as error:
            signum = interruption(error)
            if signum is not None and _stamp(folder) not in (earlier, None):
                # Workers that are asked to end while they write their results write them first.
                signals.hold(signum)
                cluster.forget_run()
                return _monitored(folder)
            if not isinstance(error, WorkerFailed):
                raise
            if signum is not None:
                print(error, file=sys.stderr)
                raise Terminated(signum) from error
            if not (folder / "checkpoints" / "last.ckpt").is_file():
                raise
            advice = f"{error}; go on from its last checkpoint with {typed('ckpt', str(folder))}"
            raise WorkerFailed(advice, error.rank, error.cause) from error


def _stamp(folder: Path) -> tuple[int, int] | None:
    """A value that changes when ``metrics.json``, the last file of a run, is written; None if there is none."""
    try:
        stat = (folder / METRICS).stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _monitored(folder: Path) -> float:
    found = json.loads((folder / METRICS).read_text())["run/monitored"]
    return nan if found is None else float(found)


def _write_diverged(plain: dict[str, Any], folder: Path) -> None:
    """Write the metrics of a run that has diverged, so that those of an earlier run are not taken for its own."""
    metrics = {
        "run/config_hash": config_hash(plain), "run/monitored": None, "run/seed": plain["seed"],
        "run/status": "diverged",
    }  # fmt: skip
    write_atomically(folder / METRICS, json.dumps(metrics, indent=2) + "\n")


def _start(plain: dict[str, Any], folder: Path, brief: bool) -> float:
    if plain["mode"] in DEPLOYMENT:
        postpone()
        from sglight import deployment

        return float(deployment.run(plain, folder))
    workers = plain["trainer"]["devices"]
    if workers == 1 or TORCHRUN in os.environ:
        return _run(plain, folder, brief)
    # One worker prepares the data first, without a time limit, because a download may take longer than a worker may
    # stand still.
    launcher.launch(_prepare, plain, workers=1, idle_timeout_s=inf)
    monitored: float = launcher.launch(
        _run, plain, folder, brief, workers=workers, idle_timeout_s=plain["trainer"]["idle_timeout_s"]
    )
    return monitored


def _prepare(plain: dict[str, Any]) -> None:
    postpone()
    from sglight.experiment import prepare

    prepare(plain)


def _run(plain: dict[str, Any], folder: Path, brief: bool = False) -> float:
    first = "sglight.experiment" not in sys.modules
    postpone()
    from sglight.experiment import run

    if first:
        # Collections of garbage leave out what the libraries have made; with it, one takes a third of a second.
        gc.freeze()
        # Libraries in C++ (triton) print a list of all that is still there at the end.
        atexit.register(gc.unfreeze)
    if TORCHRUN not in os.environ:
        return run(plain, folder, brief)
    from sglight.parallel.divergence import end_together

    return end_together(partial(run, plain, folder, brief))
