"""Measures how long a process has been idle, from Linux's /proc; on other systems a process is never idle."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK") if PROC.exists() else 1  # in a second
BUSY_STATES = "RDt"  # running, waiting for a disk, or under a debugger
STATE_NAMES = {"S": "sleeping", "T": "stopped"}
IDLE_SHARE = 0.01  # a process that uses less of a processor is idle


class Pulse:
    """How long a process has been idle.

    Args:
        pid: of the process.
        timeout_s: how long it may be idle.

    Attributes:
        still_s: for how long it has used no processor.
        idle_s: the same, not counting the time in which it waits for another worker.
    """

    still_s = idle_s = 0.0

    def __init__(self, pid: int | None, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._pid = pid
        self._state = "R"
        self._used_s = self._children_used_s = 0.0

    @property
    def state(self) -> str:
        """The state of the process, such as "sleeping"."""
        return STATE_NAMES.get(self._state, self._state)

    def measure(self, step_s: float, waiting: bool) -> None:
        """Add a step to the idle time, or set that to zero if the process has worked.

        Args:
            step_s: seconds since the last call.
            waiting: whether it waits for another worker.
        """
        used_s, self._state = _used(self._pid)
        if self._state in BUSY_STATES or used_s - self._used_s > max(self._least_s, 1.5 / TICKS):
            self._used_s = used_s
            self.still_s = self.idle_s = 0.0
        else:
            self.still_s += step_s
            self.idle_s = 0.0 if waiting and self._state != "T" else self.idle_s + step_s

    def hangs(self) -> bool:
        """Whether the process, and all processes that it has started, have been idle for too long."""
        if self.idle_s < self.timeout_s:
            return False
        before, self._children_used_s = self._children_used_s, _used_by_children(self._pid)
        if abs(self._children_used_s - before) > self._least_s:
            self.idle_s = 0.0
        return self.idle_s > 0.0

    @property
    def _least_s(self) -> float:
        """The least processor time that counts as work."""
        return IDLE_SHARE * self.timeout_s


def _stat(pid: int | None) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty if there is no such process."""
    with suppress(OSError):
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return []


def _used(pid: int | None) -> tuple[float, str]:
    """The CPU seconds of a process, and its state."""
    fields = _stat(pid)
    return (sum(map(int, fields[11:15])) / TICKS, fields[0]) if fields else (0.0, "R")


def _used_by_children(pid: int | None) -> float:
    """The CPU seconds of all processes that a process has started, directly or through others."""
    parents = {int(path.name): fields[1] for path in PROC.glob("[0-9]*") if (fields := _stat(int(path.name)))}
    family, last = {pid}, 0
    while len(family) > last:
        last = len(family)
        family |= {child for child, parent in parents.items() if int(parent) in family}
    return sum(_used(member)[0] for member in family - {pid})
