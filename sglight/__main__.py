"""The command `python -m sglight`, or `sglight` once it is installed. Torch is imported only when a run begins."""

import os
import shlex
import sys
import traceback
from contextlib import suppress
from math import nan
from pathlib import Path
from time import sleep

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sglight import __version__, cluster, signals, start, status
from sglight.commandline import flags_first, python
from sglight.config.checks import TORCHRUN
from sglight.config.completed import Completed, find_completed
from sglight.config.composing import CONF, DIVERGED, SWEEPS, check, to_plain
from sglight.config.explanations import explain
from sglight.config.quoting import typed
from sglight.errors import Diverged, Terminated, UserError, interruption
from sglight.output import tolerate

# What can be raised while the config is composed.
COMPOSITION = (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError)
# For workers other than 0 under torchrun: only worker 0 makes a run folder.
WITHOUT_FOLDER = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled"]

STAY_S = 5.0  # the longest time to wait until worker 0 has refused a command, too

# The folders of the runs of this command; the last one is the present run.
_begun: list[str] = []


class JobFailed(Exception):
    """A job of a sweep failed, and its error has been printed; the other jobs go on."""


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def launch(cfg: DictConfig) -> float:
    """Run one config, by itself or as a job of a sweep; returns the monitored metric for the sweeper."""
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
    """Run the command. A mistake of the user ends it with one sentence and status 1, a signal with 128 + its number."""
    tolerate()
    if "--version" in sys.argv[1:]:
        print(f"sglight {__version__}")
        return
    handlers = signals.answer()
    try:
        _main()
    except SystemExit as end:
        if cluster.rank() > 0 and isinstance(end.code, str):
            _leave_to_the_first_worker()
        raise
    finally:
        signals.restore(handlers)


def _main() -> None:
    """`main` while it answers signals."""
    DIVERGED.clear()
    _begun.clear()
    SWEEPS.clear()
    cluster.adopt_slurm()
    if cluster.rank() > 0:
        sys.argv += WITHOUT_FOLDER
    sys.argv[1:] = cluster.continued(sys.argv[1:])
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        launch()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its exceptions instead of printing them
    try:
        sys.argv[1:] = flags_first(sys.argv[1:])
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


def _leave_to_the_first_worker() -> None:
    """Wait for the end of worker 0 before this worker prints why the command is refused.

    Worker 0 refuses it for the same reason and prints it, and torchrun then ends this worker. If this one ended first,
    torchrun would interrupt worker 0 before it has said anything.
    """
    try:
        sleep(STAY_S)
    except Terminated:
        sys.exit(1)


def _launch() -> None:
    """Call `launch`; if a signal caused an exception, end the process as it demands."""
    try:
        launch()
    except BaseException as error:  # any, because Lightning turns Ctrl-C into exit(1)
        if (signum := interruption(error)) is not None:
            _interrupted(signum)
        raise


def _compare_jobs() -> None:
    """At the end of a sweep, print a table of its jobs and the command for a full report."""
    for folder in SWEEPS:
        from sglight.report.__main__ import summarise

        with suppress(UserError, OSError):  # the jobs themselves have printed their results
            if summarise(folder):
                command = f"{python('sglight.report')} {shlex.quote(str(folder))} --html report.html"
                print(f"report       {command}")
    SWEEPS.clear()


def _run(cfg: DictConfig) -> float:
    """Check the config and run it, unless `skip_completed` finds that run finished."""
    cfg = check(cfg)
    if cfg.skip_completed and (done := _completed(cfg)) is not None:
        reason = f"done already in {done.folder}"
        print(f"{reason}, {cfg.callbacks.checkpoint.monitor} {done.monitored:g}; skipped")
        folder = Path(HydraConfig.get().runtime.output_dir).resolve()
        if folder != done.folder:  # a sweep may be repeated in its own folder
            status.skip(folder, reason, done.folder)
        return done.monitored
    # OpenMP reads this when torch is imported. Waiting threads sleep then; on a busy machine, threads that spin slow
    # each other down many times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return start.run(cfg)


def _completed(cfg: DictConfig) -> Completed | None:
    """A finished run with the same config, under ``outputs`` or in the folder of this sweep."""
    hydra_cfg = HydraConfig.get()
    sweep = Path(to_absolute_path(hydra_cfg.sweep.dir)) if hydra_cfg.mode == RunMode.MULTIRUN else None
    return find_completed(to_plain(cfg), Path(to_absolute_path("outputs")), sweep)


def _job(cfg: DictConfig) -> float:
    """`_run` for a job of a sweep: prints an error at once, because Hydra would print only the first one at the end."""
    try:
        return _run(cfg)
    except Exception as error:
        hydra_cfg = HydraConfig.get()
        folder = Path(hydra_cfg.runtime.output_dir)
        if not (folder / status.FILE).exists():  # the run had not begun
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
    finally:
        signals.release()  # one that came behind the results of this job ends the sweep


def _came_from_a_run(error: BaseException) -> bool:
    """Whether an error was raised within `_run`, not while Hydra composed the config."""
    return any(frame.f_code is _run.__code__ for frame, _ in traceback.walk_tb(error.__traceback__))


def _interrupted(signum: int) -> None:
    """Print where the run was interrupted and how to resume it (worker 0 does), and end the process."""
    if cluster.rank() > 0:
        sys.exit(128 + signum)
    folder = _begun[-1] if _begun else ""
    if not folder:
        message = "interrupted"
    elif status.read(Path(folder)).get("status") == "finished":  # in a sweep
        message = f"interrupted behind {folder}, which is finished; go on with the same command and skip_completed=true"
    elif (Path(folder) / "checkpoints" / "last.ckpt").is_file():
        message = f"interrupted in {folder}; go on with: {python('sglight')} {typed('ckpt', folder)}"
    else:
        message = f"interrupted in {folder}, before the first checkpoint; begin anew with the same command"
    print(message, file=sys.stderr)
    sys.exit(128 + signum)


if __name__ == "__main__":
    main()
