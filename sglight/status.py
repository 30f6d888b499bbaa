"""Writes and reads the status of a run: `status.json` in its folder, to which one process at a time may write."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sglight import signals
from sglight.errors import Diverged, RunFailed, UserError, interruption
from sglight.files import remove_temporaries, replacing, write_atomically

FILE = "status.json"
# The results of a run.
RESULTS = ("metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
# Small files that a command writes before it may be refused; they are put back then.
BESIDE = (FILE, "config.yaml", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml")
Contents = dict[Path, bytes]


@contextmanager
def recorded(folder: Path, before: Contents | None = None) -> Iterator[None]:
    """Context of a run, which writes its status: ``running``, then ``finished``, ``failed`` or ``interrupted``.

    It stays ``finished`` if a signal comes behind the end of the context. If a command is refused before it has changed
    any result, the folder of an earlier run is restored.

    Args:
        folder: of the run.
        before: what `beside` returned before the run wrote anything; None to call it now.

    Raises:
        UserError: if another process writes to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        before, results = beside(folder) if before is None else before, _signature(folder)
        remove_temporaries(folder)
        process = {"host": platform.node(), "pid": os.getpid(), "started": started(os.getpid())}
        try:
            _write(folder, {"status": "running", **process})
            yield
            signals.hold()
        except BaseException as error:
            signals.hold()  # until the status is written
            refused = isinstance(error, UserError) and not isinstance(error, RunFailed)
            if interruption(error) is not None:
                _write(folder, {"status": "interrupted", **process})
            elif refused and results and results == _signature(folder):
                restore(before)
            else:
                fail(folder, error, **process)
            raise
        _write(folder, {"status": "finished", **process})


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context in which this is the only process that writes to a folder. The lock of a process ends with it.

    Raises:
        UserError: if another process writes to it.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            status = read(folder)
            who = f"process {status['pid']} on {status.get('host')}" if "pid" in status else "another process"
            raise UserError(
                f"a run of {who} writes to {folder}; wait for its end, or give another hydra.run.dir"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def beside(folder: Path) -> Contents:
    """The contents of the small files of an earlier run, which a new run in its folder overwrites first."""
    return {path: path.read_bytes() for name in BESIDE if (path := folder / name).is_file()}


def restore(contents: Contents) -> None:
    """Write the files back that `beside` returned."""
    for path, content in contents.items():
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def fail(folder: Path, error: BaseException, **process: Any) -> None:
    """Write the status of a run that failed or diverged, with the reason."""
    reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    _write(
        folder,
        {"status": "diverged" if isinstance(error, Diverged) else "failed", "reason": reason, **process},
    )


def skip(folder: Path, reason: str, done: Path) -> None:
    """Write the status of a job that was skipped, with the reason and the folder of the run that it would repeat."""
    _write(folder, {"status": "skipped", "reason": reason, "done": str(done)})


def read(folder: Path) -> dict[str, Any]:
    """The status of a run; ``stopped`` if its process has ended without writing one; empty if it is not known."""
    path = folder / FILE
    try:
        status = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(status, dict) or not isinstance(status.get("status"), str):
        return {}
    if (
        status["status"] == "running"
        and status.get("host") == platform.node()
        and not _alive(status.get("pid"), status.get("started"))
    ):
        status |= {"status": "stopped", "reason": "its process has gone"}
    return status


def started(pid: int) -> int | None:
    """The start time of a process, which tells it from a later process with the same id; None if it is not known."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _alive(pid: Any, since: Any) -> bool:
    """Whether the process with this id and start time still runs."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return since is None or (now := started(pid)) is None or now == since


def _signature(folder: Path) -> list[Any]:
    """A value that changes with the result files of a run; empty if there are none."""
    paths = [folder / name for name in RESULTS]
    stats = {path.name: path.stat() for path in paths if path.is_file()}
    return [(name, s.st_ino, s.st_mtime_ns, s.st_size) for name, s in stats.items()] if len(stats) else []


def _write(folder: Path, status: dict[str, Any]) -> None:
    text, path = json.dumps(status, indent=2) + "\n", folder / FILE
    try:
        write_atomically(path, text)
    except OSError:
        # On a full disk the present file can still be overwritten.
        with suppress(OSError), path.open("r+") as file:
            file.write(text)
            file.truncate()
