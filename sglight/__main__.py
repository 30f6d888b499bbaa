"""The command: `python -m sglight`, or `sglight` once installed. Torch is imported only when a run begins."""

import os
import shlex
import sys
import traceback
from contextlib import suppress
from math import nan
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sglight import __version__, cluster, signals, start, status
from sglight.commandline import arranged, python
from sglight.config.checks import TORCHRUN
from sglight.config.completed import Completed, find_completed
from sglight.config.composing import CONF, DIVERGED, SWEEPS, check, to_plain
from sglight.config.explanations import explain
from sglight.errors import Diverged, UserError, interruption
from sglight.output import tolerate

COMPOSITION = (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError)


# Only worker 0 of those that torchrun starts has a folder; it tells the others.
WITHOUT_FOLDER = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled"]


# Folders of the runs of this command, of which the last one goes on.
_begun: list[str] = []


class JobFailed(Exception):
    """One job of a sweep failed and has said why; the others go on."""


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def launch(cfg: DictConfig) -> float:
    """One run, alone or as a job of a sweep; gives the monitored metric to the sweeper."""
    _begun.append(to_absolute_path(HydraConfig.get().runtime.output_dir))
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        if TORCHRUN in os.environ:
            raise SystemExit(
                "error: a sweep (-m) does not run under torchrun; start one run, or leave torchrun out"
            )
        return _job(cfg)
    try:
        return _run(cfg)
    except UserError as error:
        raise SystemExit(f"error: {error}") from None


def main() -> None:
    """Run the command; mistakes of the user end it with one sentence and status 1, signals with 128 + their number."""
    tolerate()
    if "--version" in sys.argv[1:]:
        print(f"sglight {__version__}")
        return
    handlers = signals.answer()
    DIVERGED.clear()
    _begun.clear()
    SWEEPS.clear()
    cluster.adopt_slurm()
    if cluster.rank() > 0:
        sys.argv += WITHOUT_FOLDER
    sys.argv[1:] = cluster.continued(sys.argv[1:])
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        try:
            launch()
        finally:
            signals.restore(handlers)
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then hands its exceptions on instead of printing them
    try:
        sys.argv[1:] = arranged(sys.argv[1:])
        try:
            _launch()
        finally:
            _compare_jobs()
        if DIVERGED:
            sys.exit(f"error: {', '.join(DIVERGED)} diverged; see the messages above")
    except JobFailed:
        sys.exit("error: not all jobs of the sweep succeeded; see the messages above")
    except UserError as error:
        sys.exit(f"error: {error}")
    except RecursionError as error:
        if _came_from_a_run(error):
            raise
        sys.exit("error: the brackets of a value are nested too deeply to be read; no key needs so many")
    except COMPOSITION as error:
        if _came_from_a_run(error):
            raise
        sys.exit(f"error: {explain(error, CONF, sys.argv[1:])}")
    finally:
        del os.environ["HYDRA_FULL_ERROR"]
        signals.restore(handlers)


def _launch() -> None:
    """`launch`; a signal ends the process, whatever else went wrong while it was answered."""
    try:
        launch()
    except BaseException as error:  # Lightning turns Ctrl-C into exit(1)
        if (signum := interruption(error)) is not None:
            _interrupted(signum)
        raise


def _compare_jobs() -> None:
    """At the end of a sweep, one table of its jobs and the command for more."""
    for folder in SWEEPS:
        from sglight.report.__main__ import summarise

        with suppress(UserError, OSError):  # the jobs have had their say
            if summarise(folder):
                command = f"{python('sglight.report')} {shlex.quote(str(folder))} --html report.html"
                print(f"report       {command}")
    SWEEPS.clear()


def _run(cfg: DictConfig) -> float:
    cfg = check(cfg)
    if cfg.skip_completed and (done := _completed(cfg)) is not None:
        reason = f"done already in {done.folder}"
        print(f"{reason}, {cfg.callbacks.checkpoint.monitor} {done.monitored:g}; skipped")
        folder = Path(HydraConfig.get().runtime.output_dir).resolve()
        if folder != done.folder:  # a sweep may be repeated in its own folder
            status.skip(folder, reason)
        return done.monitored
    # Waiting threads sleep: spinning ones slow each other down manyfold on a machine with other work. Read by OpenMP
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return start.run(cfg)


def _completed(cfg: DictConfig) -> Completed | None:
    """The finished run that did what `cfg` asks for, under ``outputs`` or in the folder of this sweep."""
    hydra_cfg = HydraConfig.get()
    sweep = Path(to_absolute_path(hydra_cfg.sweep.dir)) if hydra_cfg.mode == RunMode.MULTIRUN else None
    return find_completed(to_plain(cfg), Path(to_absolute_path("outputs")), sweep)


def _job(cfg: DictConfig) -> float:
    """`_run`, but a failure is told at once: at the end of a sweep Hydra tells of the first one only."""
    try:
        return _run(cfg)
    except Exception as error:
        hydra_cfg = HydraConfig.get()
        folder = Path(hydra_cfg.runtime.output_dir)
        if not (folder / status.FILE).exists():  # it had not begun
            status.fail(folder, error)
        name = f"job {hydra_cfg.job.num} ({hydra_cfg.job.override_dirname})"
        if isinstance(error, Diverged):
            print(f"{name} diverged: {error}", file=sys.stderr)
            return nan
        if isinstance(error, UserError):
            print(f"error in {name}: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"error in {name}: {type(error).__name__}, see the traceback above", file=sys.stderr)
        raise JobFailed(name) from None


def _came_from_a_run(error: BaseException) -> bool:
    return any(frame.f_code is _run.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _interrupted(signum: int) -> None:
    """Say where the run is and how to go on, and end."""
    folder = _begun[-1] if _begun else ""
    if not folder:
        told = "interrupted"
    elif (Path(folder) / "checkpoints" / "last.ckpt").is_file():
        told = f"interrupted in {folder}; go on with: {python('sglight')} ckpt={shlex.quote(folder)}"
    else:
        told = f"interrupted in {folder}, before the first checkpoint; begin anew with the same command"
    print(told, file=sys.stderr)
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
