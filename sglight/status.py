"""What has become of a run, as a file in its folder: `metrics.json` is there only at the end; imports no torch."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sglight.files import replacing

FILE = "status.json"


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Write to ``folder`` that a run goes on here, and in the end whether it finished, failed or was interrupted."""
    process = {"host": platform.node(), "pid": os.getpid()}
    _write(folder, {"status": "running", **process})
    try:
        yield
    except BaseException as error:
        # Lightning turns Ctrl-C into exit(1).
        interrupted = isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt)
        if interrupted or type(error).__name__ == "SIGTERMException":  # Lightning's
            _write(folder, {"status": "interrupted", **process})
        else:
            fail(folder, error, **process)
        raise
    _write(folder, {"status": "finished", **process})


def fail(folder: Path, error: BaseException, **process: Any) -> None:
    """Write to ``folder`` that a run failed, and why."""
    reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    _write(folder, {"status": "failed", "reason": reason, **process})


def skip(folder: Path, reason: str) -> None:
    """Write to ``folder`` that no run was needed here."""
    _write(folder, {"status": "skipped", "reason": reason})


def read(folder: Path) -> dict[str, Any]:
    """What `recorded` has written; a run whose process has gone without a word is ``stopped``; empty if unknown."""
    try:
        status = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(status, dict) or not isinstance(status.get("status"), str):
        return {}
    if (
        status["status"] == "running"
        and status.get("host") == platform.node()
        and not _alive(status.get("pid"))
    ):
        status |= {"status": "stopped", "reason": "its process has gone"}
    return status


def _alive(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _write(folder: Path, status: dict[str, Any]) -> None:
    with replacing(folder / FILE) as temporary:
        temporary.write_text(json.dumps(status, indent=2) + "\n")
