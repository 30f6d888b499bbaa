"""What has become of a run, as a file in its folder, which one process at a time writes to; imports no torch."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sglight.errors import Diverged, RunFailed, UserError, interruption
from sglight.files import remove_temporaries, replacing, write_atomically

FILE = "status.json"
# What a finished run consists of, and what a command that is refused has changed of it by then.
RESULTS = ("metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt")
BESIDE = (FILE, "config.yaml", ".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml")
Contents = dict[Path, bytes]


@contextmanager
def recorded(folder: Path, before: Contents | None = None) -> Iterator[None]:
    """Write to ``folder`` that a run goes on here, and in the end what became of it.

    A command that is refused before it has changed any result leaves the folder of an earlier run as it was.

    Args:
        before: what `beside` gave before anything was written, where something has been.

    Raises:
        UserError: if another process writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        before, results = beside(folder) if before is None else before, _signature(folder)
        remove_temporaries(folder)
        process = {"host": platform.node(), "pid": os.getpid(), "started": started(os.getpid())}
        _write(folder, {"status": "running", **process})
        try:
            yield
        except BaseException as error:
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
    """Be the only process that writes to a folder; the system lifts the lock of a process that has gone.

    Raises:
        UserError: if another one is.
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
            told = read(folder)
            who = f"process {told['pid']} on {told.get('host')}" if "pid" in told else "another process"
            raise UserError(
                f"a run of {who} writes to {folder}; wait for its end, or give another hydra.run.dir"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def beside(folder: Path) -> Contents:
    """The small files of an earlier run, which a new one in its folder overwrites as it begins."""
    return {path: path.read_bytes() for name in BESIDE if (path := folder / name).is_file()}


def restore(contents: Contents) -> None:
    """Put back what `beside` gave."""
    for path, content in contents.items():
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def fail(folder: Path, error: BaseException, **process: Any) -> None:
    """Write to ``folder`` that a run failed, or diverged, and why."""
    reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    _write(
        folder,
        {"status": "diverged" if isinstance(error, Diverged) else "failed", "reason": reason, **process},
    )


def skip(folder: Path, reason: str) -> None:
    """Write to ``folder`` that no run was needed here."""
    _write(folder, {"status": "skipped", "reason": reason})


def read(folder: Path) -> dict[str, Any]:
    """What `recorded` has written; a run whose process has gone without a word is ``stopped``; empty if unknown."""
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
    """When a process began, in ticks since the machine did: two processes of one number differ in it."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _alive(pid: Any, since: Any) -> bool:
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
    """Which files the results of a run are; empty if it has none."""
    paths = [folder / name for name in RESULTS]
    stats = {path.name: path.stat() for path in paths if path.is_file()}
    return [(name, s.st_ino, s.st_mtime_ns, s.st_size) for name, s in stats.items()] if len(stats) else []


def _write(folder: Path, status: dict[str, Any]) -> None:
    text, path = json.dumps(status, indent=2) + "\n", folder / FILE
    try:
        write_atomically(path, text)
    except OSError:
        # On a full disk there is still the room that the file has.
        with suppress(OSError), path.open("r+") as file:
            file.write(text)
            file.truncate()
