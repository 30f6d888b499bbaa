"""Starts, watches and ends the worker processes, and finds out which of them failed first."""

from __future__ import annotations

import math
import os
import pickle
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection
from time import monotonic, sleep

from sglight.errors import PeerLost, RunFailed, Terminated, UserError
from sglight.parallel.pulse import Pulse
from sglight.parallel.server import Context, stop_server
from sglight.parallel.worker import SIGNALLED, STOP_S, Raised, Returned, Setting, Worker, work
from sglight.signals import ENDING, PATIENCE_S

POLL_S = 0.25  # the time between two checks of the workers
SETTLE_S = 1.0  # failures within this time are compared to find the cause
TRIES, RETRY_S = 5, 0.2  # to fork a worker, while its server ends and another one begins
LEAVE_S = 3.0  # the time that the other workers have to end by themselves after a failure

STARTING = "its start"
IN_SCRIPT = 'see above; a script that starts workers does so under `if __name__ == "__main__":`'
NO_SERVER = (
    "workers cannot be started: the process that forks them has ended; if nothing above says why, this user may not "
    "execute {}; or train in one process with trainer.devices=1"
)
MORE_TIME = "allow more time with trainer.idle_timeout_s"


class WorkerFailed(RunFailed):
    """A worker died, hung or raised an exception.

    Attributes:
        rank: of the worker; -1 if it is unknown.
        cause: what happened to it, e.g. "was killed by SIGKILL".
    """

    def __init__(self, text: str, rank: int = -1, cause: str = "") -> None:
        super().__init__(text)
        self.rank, self.cause = rank, cause


class Member:
    """The process of a worker.

    Attributes:
        started: whether it has been started.
        running: whether it runs.
        report: what it has sent at its end.
        failed_at: the time when its failure was noticed.
    """

    started = running = False
    report: Returned | Raised | None = None
    failed_at = math.inf

    def __init__(self, context: Context, worker: Worker, setting: Setting) -> None:
        self.rank, self.status = worker.rank, worker.status
        self._pipe, self._its_end = context.Pipe()
        arguments = (worker, self._its_end, setting)
        self.process = context.Process(target=work, args=arguments, name=f"worker-{worker.rank}")

    def __str__(self) -> str:
        name = self.status.read().name
        return f"worker {self.rank} ({name})" if name else f"worker {self.rank}"

    def start(self) -> None:
        """Start the process."""
        self.status.set_doing(STARTING)
        self.process.start()
        self.started = self.running = True
        self._its_end.close()

    def send_task(self, task: bytes) -> None:
        """Send the function to run and its arguments, pickled."""
        with suppress(OSError):  # if it has died, `watch` will notice
            self._pipe.send_bytes(task)

    @property
    def failed(self) -> bool:
        """Whether it has raised an exception, or ended without a report."""
        return isinstance(self.report, Raised) or (not self.running and self.report is None)

    @property
    def lost(self) -> bool:
        """Whether it failed because another worker had failed."""
        return isinstance(self.report, Raised) and self.report.lost

    @property
    def waiting(self) -> str:
        """What it waits for from another worker; empty if it does not wait."""
        return self.status.read().waiting

    def refresh(self) -> None:
        """Update whether it runs, and its report."""
        self.running = (
            self.process.exitcode is None
        )  # before the report is read, which a worker sends before it ends
        with suppress(EOFError, OSError):
            if self.report is None and self._pipe.poll():
                self.report = pickle.loads(self._pipe.recv_bytes())
        if self.failed:
            self.failed_at = min(self.failed_at, monotonic())

    def signal(self, signum: int) -> None:
        """Pass on a signal that asks the run to end."""
        if self._runs() and self.process.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signum)

    def terminate(self) -> None:
        """Ask it to end immediately."""
        self.status.hurry()
        if self._runs():
            self.process.terminate()

    def kill(self) -> None:
        """End it by force."""
        if self._runs():
            self.process.kill()

    def _runs(self) -> bool:
        return self.running and self.process.exitcode is None

    def close(self) -> None:
        """Wait for its end, and release its resources."""
        if self.running:
            self.process.join()
        self.process.close()
        self._pipe.close()
        self._its_end.close()


def _fork(member: Member) -> None:
    """Start a process; if the server has just ended, by another one, which multiprocessing then starts."""
    for left in reversed(range(TRIES)):
        try:
            member.start()
        except (ConnectionError, EOFError) as error:
            if not left:
                raise WorkerFailed(
                    NO_SERVER.format(sys.executable), member.rank, "was not started"
                ) from error
            sleep(RETRY_S)
        else:
            return


def start(members: Sequence[Member], task: bytes) -> None:
    """Start all processes, and send each the task.

    Raises:
        WorkerFailed: if the server from which they are forked has ended.
    """
    for member in members:
        _fork(member)
    for member in members:
        member.send_task(task)


def watch(members: Sequence[Member], idle_timeout_s: float) -> None:
    """Wait until all have ended.

    Raises:
        UserError: if a worker raised it.
        WorkerFailed: if a worker raised another exception, died or hung; its ``__cause__`` is `Terminated` if a signal
            asked the worker to end.
    """
    pulses = {member: Pulse(member.process.pid, idle_timeout_s) for member in members}
    seen, reports = monotonic(), 0
    while any(member.running for member in members):
        _wait_for_an_end(members, POLL_S)
        if any(member.failed for member in members):
            _wait_for_all_ends(members, LEAVE_S)
            raise _failure(_first_cause(members))
        # If this process itself was stopped, as by Ctrl-Z, that time does not count as idle time of workers.
        step_s, seen = min(monotonic() - seen, 2 * POLL_S), monotonic()
        if (now := sum(member.report is not None for member in members)) > reports:
            # Who has just reported worked until now; those who waited for it may not know yet.
            reports = now
            for pulse in pulses.values():
                pulse.still_s = 0.0
        _check_pulses({member: pulses[member] for member in members if member.running}, step_s)


def end_together(members: Sequence[Member], signum: int) -> None:
    """Pass on a signal to all workers, and wait as long as they may need to write a checkpoint."""
    for member in members:
        member.signal(signum)
    _wait_for_all_ends(members, PATIENCE_S + SETTLE_S)


def stop(members: Sequence[Member]) -> None:
    """End all workers that still run, by SIGTERM, and by SIGKILL after `STOP_S` seconds.

    If no worker has been started, the server ends too, because it may still be importing modules for them.
    """
    if not any(member.started for member in members):
        stop_server()
    try:
        for member in members:
            member.terminate()
        _wait_for_all_ends(members, STOP_S)
    finally:
        for member in members:
            member.kill()
        for member in members:
            member.close()


def _wait_for_an_end(members: Sequence[Member], at_most_s: float) -> None:
    """Wait until a worker ends, or ``at_most_s`` seconds, and update all."""
    connection.wait([member.process.sentinel for member in members if member.running], at_most_s)
    for member in members:
        member.refresh()


def _wait_for_all_ends(members: Sequence[Member], at_most_s: float) -> None:
    """Wait until all workers have ended, or ``at_most_s`` seconds."""
    deadline = monotonic() + at_most_s
    while any(member.running for member in members) and (left_s := deadline - monotonic()) > 0:
        _wait_for_an_end(members, min(left_s, POLL_S))


def _check_pulses(pulses: Mapping[Member, Pulse], step_s: float) -> None:
    """Raise `WorkerFailed` if a running worker hangs, or if all wait for each other."""
    for member, pulse in pulses.items():
        pulse.measure(step_s, waiting=bool(member.waiting))
    for member, pulse in pulses.items():
        if pulse.hangs():
            member.kill()
            if member.report is None:  # otherwise its work is done
                _wait_for_all_ends(list(pulses), LEAVE_S)
                cause = f"hangs: no work done for {pulse.timeout_s:g} s (state: {pulse.state})"
                raise _worker_failed(member, cause, MORE_TIME)
    working = {member: pulse for member, pulse in pulses.items() if member.report is None}
    if working and all(member.waiting and p.still_s >= p.timeout_s for member, p in working.items()):
        raise _deadlock(working)


def _deadlock(working: Mapping[Member, Pulse]) -> WorkerFailed:
    first = next(iter(working))
    waits = ", ".join(f"{member} waits for {member.waiting}" for member in working)
    text = f"a deadlock: for {working[first].timeout_s:g} s {waits}, and nobody works; {MORE_TIME}"
    return WorkerFailed(text, first.rank, "deadlock")


def _first_cause(members: Sequence[Member]) -> Member:
    """The worker whose failure caused those of the others.

    It is one that died without a report, or otherwise the one that first raised an exception of its own.
    """
    failed = sorted((m for m in members if m.failed), key=lambda m: (m.lost, m.failed_at))
    first = failed[0]
    near = [m for m in failed if m.lost == first.lost and m.failed_at <= first.failed_at + SETTLE_S]
    return min(near, key=lambda m: m.report is not None)


def _failure(member: Member) -> UserError:
    """The exception to raise for a worker that has failed."""
    report = member.report
    if not isinstance(report, Raised):
        return _died(member)
    if report.user:
        with suppress(Exception):  # its class may be unknown here
            if isinstance(error := pickle.loads(report.exception), UserError):
                return error
        return UserError(report.message)
    if report.kind != PeerLost.__name__:
        print(report.traceback, end="", file=sys.stderr)
    error = _worker_failed(member, ": ".join(["raised " + report.kind, *report.message.splitlines()[:1]]))
    with suppress(Exception):  # its class may be unknown here
        error.__cause__ = pickle.loads(report.exception)
    return error


def _died(member: Member) -> WorkerFailed:
    """The exception to raise for a worker that has ended without a report."""
    status = member.process.exitcode
    assert status is not None
    number = status - SIGNALLED if status - SIGNALLED in ENDING else -status
    if number <= 0:
        return _worker_failed(member, f"exited with status {status}")
    error = _worker_failed(member, f"was killed by {signal.Signals(number).name}")
    if number in ENDING:
        error.__cause__ = Terminated(number)
    return error


def _worker_failed(member: Member, cause: str, remedy: str = "") -> WorkerFailed:
    doing = member.status.read().doing
    during = f" during {doing}" if doing else ""
    remedy = IN_SCRIPT if doing == STARTING else remedy
    text = "; ".join(filter(None, [f"{member} {cause}{during}", remedy]))
    return WorkerFailed(text, member.rank, cause)
