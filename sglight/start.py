"""Where a run happens: in this process, or in workers; imports no torch, which the workers load while they start."""

from __future__ import annotations

import json
import os
import sys
from math import inf
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sglight import cluster
from sglight.config.checks import DEPLOYMENT, TORCHRUN
from sglight.config.completed import config_hash
from sglight.config.composing import EARLIER, to_plain
from sglight.errors import Diverged, Terminated, interruption
from sglight.files import write_atomically
from sglight.parallel import launcher
from sglight.parallel.launcher import WorkerFailed
from sglight.status import recorded

# What schedulers and launchers leave in the environment: alone, it would tell Lightning of workers that there are not.
LEFT_OVER = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_NODEID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK",
)  # fmt: skip


def run(cfg: DictConfig, folder: Path | None = None) -> float:
    """Train and test (``mode=fit``) or test (``mode=test``) what the config describes; returns the monitored metric.

    With ``trainer.devices`` above 1 this happens in as many worker processes, which are started here unless torchrun
    has done so.

    Args:
        cfg: the composed and checked config.
        folder: where the run leaves its files; Hydra's run folder by default.

    Raises:
        UserError: if the config asks for something that does not exist or go together, or if a worker fails.
    """
    folder = Path(HydraConfig.get().runtime.output_dir) if folder is None else folder
    plain = to_plain(cfg)
    if TORCHRUN not in os.environ:
        for name in LEFT_OVER:
            os.environ.pop(name, None)
    elif int(os.environ["RANK"]) > 0:  # the first has the folder
        return _run(plain, folder)
    brief = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    with recorded(folder, EARLIER.pop(folder.resolve(), None)):
        cluster.note_run(folder)
        try:
            monitored = _start(plain, folder, brief)
            cluster.forget_run()
            return monitored
        except Diverged:
            _tell_diverged(plain, folder)
            raise
        except WorkerFailed as error:
            if (signum := interruption(error)) is not None:
                print(error, file=sys.stderr)
                raise Terminated(signum) from error
            if not (folder / "checkpoints" / "last.ckpt").is_file():
                raise
            advice = f"{error}; go on from its last checkpoint with ckpt={folder}"
            raise WorkerFailed(advice, error.rank, error.cause) from error


def _tell_diverged(plain: dict[str, Any], folder: Path) -> None:
    """Write the metrics of a run that has come to none, so that no earlier ones are taken for them."""
    metrics = {
        "run/config_hash": config_hash(plain), "run/monitored": None, "run/seed": plain["seed"],
        "run/status": "diverged",
    }  # fmt: skip
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")


def _start(plain: dict[str, Any], folder: Path, brief: bool) -> float:
    if plain["mode"] in DEPLOYMENT:
        from sglight import deployment

        return float(deployment.run(plain, folder))
    workers = plain["trainer"]["devices"]
    if workers == 1 or TORCHRUN in os.environ:
        return _run(plain, folder, brief)
    # By one first, and without a limit: a download may stand still for longer than a worker should, and the others
    # would stand still with it.
    launcher.launch(_prepare, plain, workers=1, idle_timeout_s=inf)
    monitored: float = launcher.launch(
        _run, plain, folder, brief, workers=workers, idle_timeout_s=plain["trainer"]["idle_timeout_s"]
    )
    return monitored


def _prepare(plain: dict[str, Any]) -> None:
    from sglight.experiment import prepare

    prepare(plain)


def _run(plain: dict[str, Any], folder: Path, brief: bool = False) -> float:
    from sglight.experiment import run

    return run(plain, folder, brief)
