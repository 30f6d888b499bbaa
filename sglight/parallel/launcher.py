"""Worker processes on this machine: started together, watched, and ended together.

`launch` runs a function in all of them. In a worker `current` tells which one it is, and has the `Status` by which it
says what it does.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import c_char
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any, NoReturn

from sglight.errors import PeerLost, UserError

POLL_S = 0.25  # between two looks at the workers
SETTLE_S = 1.0  # after a failure, for another one to be its cause
LEAVE_S = 3.0  # after a failure, for the others to end by themselves
STOP_S = 1.5  # between SIGTERM and SIGKILL
IDLE = 0.01  # of a processor: who uses less does nothing
TEXT = 200  # bytes
FOLDER = 50  # bytes: in longer ones there is no room for sockets, whose paths end at 104

PRELOAD = ["torch", "pytorch_lightning", "sglight.experiment"]
PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK") if PROC.exists() else 1
STATES = {"S": "sleeping", "T": "stopped"}
BUSY = "RDt"  # running, waiting for a disk, under a debugger
CONNECTION = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting")
START = "its start"
IN_SCRIPT = 'see above; a script that starts workers does so under `if __name__ == "__main__":`'
REMEDY = "go on from the last checkpoint with ckpt=last"
MORE_TIME = f"{REMEDY}, or allow more time with trainer.idle_timeout_s"


class WorkerFailed(UserError):
    """A worker died, hung or raised something.

    Attributes:
        rank: of the worker, as far as it is one. cause: what became of it, e.g. "was killed by SIGKILL".
    """

    def __init__(self, text: str, rank: int = -1, cause: str = "") -> None:
        super().__init__(text)
        self.rank, self.cause = rank, cause


class Status:
    """What a worker tells its supervisor, by memory that both see."""

    def __init__(self) -> None:
        self._name, self._doing, self._waiting = (RawArray(c_char, TEXT) for _ in range(3))

    def name(self, stages: str) -> None:
        """What it is, e.g. "stages 2-3"."""
        self._name.value = stages.encode()[:TEXT]

    def doing(self, text: str) -> None:
        """What it is at, e.g. "batch 17"."""
        self._doing.value = text.encode()[:TEXT]

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """While another worker keeps it waiting for e.g. "the state of batch 17": it may then be idle."""
        before = self._waiting.value
        self._waiting.value = text.encode()[:TEXT]
        try:
            yield
        finally:
            self._waiting.value = before

    def told(self) -> tuple[str, str, str]:
        """Its name, what it does, and what it waits for; empty where it has said nothing."""
        name, doing, waiting = (
            text.value.decode(errors="ignore") for text in (self._name, self._doing, self._waiting)
        )
        return name, doing, waiting


@dataclass(frozen=True)
class Worker:
    """What a worker knows of itself.

    Attributes:
        rank: from 0. size: number of workers.
        folder: where they meet, for this run alone; its path is short enough for sockets.
        status: what the supervisor is told.
    """

    rank: int
    size: int
    folder: Path
    status: Status


_current: Worker | None = None


def current() -> Worker | None:
    """The worker that this process is, if `launch` started it."""
    return _current


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def launch(
    function: Callable[..., Any],
    *args: Any,
    workers: int,
    threads: int | None = None,
    idle_timeout_s: float = 10.0,
    **kwargs: Any,
) -> Any:
    """Run ``function(*args, **kwargs)`` in new processes on this machine; returns the result of worker 0.

    The function must be importable, and everything must pickle.

    Args:
        workers: how many. threads: CPU threads of each.
        idle_timeout_s: a worker that does nothing for so long, though no other keeps it waiting, has failed.

    Raises:
        UserError: what a worker raised as such.
        WorkerFailed: if a worker raised something else, died or hung; all have ended then.
    """
    task = _packed((function, args, kwargs))
    context, setting = _context(), Setting.here(threads)
    with _meeting_place() as folder:
        crew = [_Member(context, Worker(rank, workers, folder, Status()), setting) for rank in range(workers)]
        try:
            _start(crew, task)
            _watch(crew, idle_timeout_s)
        finally:
            _stop(crew)
    assert isinstance(crew[0].report, Returned)
    return pickle.loads(crew[0].report.value)


def _packed(task: Any) -> bytes:
    try:
        # Not multiprocessing's own pickler: there torch sends tensors as open files.
        return pickle.dumps(task)
    except Exception as error:  # of whatever class what does not pickle chooses
        raise UserError(
            f"this cannot go to worker processes: {error}; define functions and classes at the top of a module, "
            "or train in one process with trainer.devices=1"
        ) from error


@contextmanager
def _meeting_place() -> Iterator[Path]:
    parent = tempfile.gettempdir()
    short = parent if len(os.fsencode(parent)) <= FOLDER else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="sglight-", dir=short))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# In a worker


@dataclass(frozen=True)
class Returned:
    """A worker's report: its function has returned. Only worker 0 sends the value, pickled."""

    value: bytes = b""


@dataclass(frozen=True)
class Raised:
    """A worker's report: its function has raised.

    Attributes:
        kind, message: of the exception. user: whether it is a `UserError`.
        lost: whether it comes from another worker's failure.
        exception: itself, pickled; empty if it does not pickle.
    """

    kind: str
    message: str
    user: bool
    lost: bool
    traceback: str
    exception: bytes

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        text = "".join(traceback.format_exception(error))
        user = isinstance(error, UserError)
        lost = not user and _is_consequence(error)
        return cls(type(error).__name__, str(error), user, lost, text, _pickled(error))


def _is_consequence(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, PeerLost | ConnectionError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in CONNECTION):
            return True
        error = error.__cause__ or error.__context__
    return False


def _pickled(error: BaseException) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)  # fails if __init__ wants more than the message
    except Exception:
        return b""
    return data


class _Terminated(SystemExit):
    """SIGTERM came."""

    STATUS = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Setting:
    """What workers take over from their parent, instead of from the server that it started once.

    Attributes:
        environ: variables. threads: of torch. start_method: for processes of their own, such as those that load data.
    """

    environ: dict[str, str]
    threads: int | None
    start_method: str

    @classmethod
    def here(cls, threads: int | None) -> Setting:
        own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        return cls({**os.environ, **own}, threads, multiprocessing.get_start_method())

    def enter(self) -> None:
        os.environ.clear()
        os.environ.update(self.environ)
        multiprocessing.set_start_method(self.start_method, force=True)
        if self.threads is not None:
            import torch  # in the workers: who starts them need not wait for it as well

            torch.set_num_threads(self.threads)


def _work(worker: Worker, pipe: connection.Connection, setting: Setting) -> None:
    """A worker's life."""
    global _current
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, _terminate)
    Thread(target=_follow_parent, args=(worker.folder,), daemon=True).start()
    setting.enter()
    _current = worker
    report = _report(worker, pipe)
    with suppress(OSError):
        pipe.send_bytes(pickle.dumps(report))
    sys.exit(isinstance(report, Raised))


def _report(worker: Worker, pipe: connection.Connection) -> Returned | Raised:
    try:
        function, args, kwargs = pickle.loads(pipe.recv_bytes())
        worker.status.doing("")
        result = function(*args, **kwargs)
        return Returned(_packed_result(result) if worker.rank == 0 else b"")
    except _Terminated:
        raise
    except BaseException as error:
        return Raised.of(error)


def _packed_result(result: Any) -> bytes:
    try:
        return pickle.dumps(result)
    except Exception as error:
        raise TypeError(f"the result does not pickle: {error}") from error


def _terminate(*_: Any) -> NoReturn:
    """End by an exception, so that what is open is closed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated(_Terminated.STATUS)


def _follow_parent(folder: Path) -> None:
    """End when the parent does, however it does, but let what is open be closed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
    sleep(STOP_S)
    os._exit(1)


# In the parent

Context = Any  # of multiprocessing


def _context() -> Context:
    """Workers are forked from a server that has imported what they need; where there is none they start afresh."""
    methods = multiprocessing.get_all_start_methods()
    if multiprocessing.get_start_method() not in methods:
        # In a process of joblib's, whose own method the workers would not know.
        multiprocessing.set_start_method("spawn", force=True)
    if "forkserver" not in methods:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    _serve()
    return context


def _serve() -> None:
    """Start the server unless it runs: deaf to Ctrl-C, like all that it forks, and without threads of OpenBLAS."""
    from multiprocessing import forkserver  # not everywhere

    resource_tracker.ensure_running()  # otherwise started with the server, when it would lift the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    given = "OPENBLAS_NUM_THREADS" in os.environ
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        forkserver.ensure_running()
    finally:
        if not given:
            del os.environ["OPENBLAS_NUM_THREADS"]
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _end_server() -> None:
    """While it imports things it would not notice that nobody needs it."""
    from multiprocessing.forkserver import _forkserver

    if pid := getattr(_forkserver, "_forkserver_pid", None):
        os.kill(pid, signal.SIGTERM)


class _Member:
    """A worker as its supervisor sees it.

    Attributes:
        running: whether its process is. report: what it has sent at last. failed_at: when its failure was noticed.
        still_s: for how long it has used no processor. idle_s: and has not been kept waiting. state: of its process.
    """

    running = False
    report: Returned | Raised | None = None
    failed_at = math.inf
    still_s = idle_s = 0.0
    state = "R"
    _used_s = _children_s = 0.0

    def __init__(self, context: Context, worker: Worker, setting: Setting) -> None:
        self.rank, self.status = worker.rank, worker.status
        self._pipe, self._theirs = context.Pipe()
        arguments = (worker, self._theirs, setting)
        self.process = context.Process(target=_work, args=arguments, name=f"worker-{worker.rank}")

    def __str__(self) -> str:
        name, _, _ = self.status.told()
        return f"worker {self.rank} ({name})" if name else f"worker {self.rank}"

    def start(self) -> None:
        self.status.doing(START)
        self.process.start()
        self.running = True
        self._theirs.close()

    def give(self, task: bytes) -> None:
        with suppress(OSError):  # if it has died, that is seen later
            self._pipe.send_bytes(task)

    @property
    def failed(self) -> bool:
        return isinstance(self.report, Raised) or (not self.running and self.report is None)

    @property
    def lost(self) -> bool:
        """Whether it failed because another one did."""
        return isinstance(self.report, Raised) and self.report.lost

    @property
    def waiting(self) -> str:
        """What another worker keeps it waiting for."""
        return self.status.told()[2]

    def look(self) -> None:
        """Note whether it has ended, and what it reports."""
        self.running = self.process.exitcode is None  # first: the report comes before the end
        with suppress(EOFError, OSError):
            if self.report is None and self._pipe.poll():
                self.report = pickle.loads(self._pipe.recv_bytes())
        if self.failed:
            self.failed_at = min(self.failed_at, monotonic())

    def feel(self, step_s: float, timeout_s: float) -> None:
        """Its pulse: the time in which it did nothing grows by a step, or begins anew."""
        used_s, self.state = _used(self.process.pid)
        if self.state in BUSY or used_s - self._used_s > max(IDLE * timeout_s, 1.5 / TICKS):
            self._used_s = used_s
            self.still_s = self.idle_s = 0.0
        else:
            self.still_s += step_s
            self.idle_s = 0.0 if self.waiting and self.state != "T" else self.idle_s + step_s

    def hangs(self, timeout_s: float) -> bool:
        """Whether it has been idle for too long, and so have the processes that it has started."""
        if self.idle_s < timeout_s:
            return False
        before, self._children_s = self._children_s, _used_by_children(self.process.pid)
        if abs(self._children_s - before) > IDLE * timeout_s:
            self.idle_s = 0.0
        return self.idle_s > 0.0

    def stop(self, hard: bool = False) -> None:
        if self.running and self.process.exitcode is None:
            (self.process.kill if hard else self.process.terminate)()

    def close(self) -> None:
        if self.running:
            self.process.join()
        self.process.close()
        self._pipe.close()
        self._theirs.close()


def _stat(pid: int | None) -> list[str]:
    """What Linux knows of a process, from its state on."""
    with suppress(OSError):
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return []


def _used(pid: int | None) -> tuple[float, str]:
    """CPU seconds of a process and its state; where there is no /proc it always runs."""
    fields = _stat(pid)
    return (sum(map(int, fields[11:15])) / TICKS, fields[0]) if fields else (0.0, "R")


def _used_by_children(pid: int | None) -> float:
    """CPU seconds of the processes that a process has started, such as those that load data, and of theirs."""
    parents = {int(path.name): fields[1] for path in PROC.glob("[0-9]*") if (fields := _stat(int(path.name)))}
    family, last = {pid}, 0
    while len(family) > last:
        last = len(family)
        family |= {child for child, parent in parents.items() if int(parent) in family}
    return sum(_used(member)[0] for member in family - {pid})


def _start(crew: Sequence[_Member], task: bytes) -> None:
    try:
        for member in crew:
            member.start()
    except BaseException:
        if not crew[0].running:
            _end_server()
        raise
    for member in crew:
        member.give(task)


def _watch(crew: Sequence[_Member], idle_timeout_s: float) -> None:
    """Until all have ended, or one has failed."""
    seen = monotonic()
    while any(member.running for member in crew):
        _look(crew, POLL_S)
        if any(member.failed for member in crew):
            _let_leave(crew, LEAVE_S)
            raise _failure(_first_cause(crew))
        # Whoever was stopped itself, as by Ctrl-Z, has seen nobody idle.
        step_s, seen = min(monotonic() - seen, 2 * POLL_S), monotonic()
        _check_pulses([member for member in crew if member.running], step_s, idle_timeout_s)


def _look(crew: Sequence[_Member], wait_s: float) -> None:
    """Wait until a worker ends, but not for longer; note what has happened."""
    connection.wait([member.process.sentinel for member in crew if member.running], wait_s)
    for member in crew:
        member.look()


def _let_leave(crew: Sequence[_Member], wait_s: float) -> None:
    """Wait until all have ended, but not for longer."""
    deadline = monotonic() + wait_s
    while any(member.running for member in crew) and (left_s := deadline - monotonic()) > 0:
        _look(crew, min(left_s, POLL_S))


def _stop(crew: Sequence[_Member]) -> None:
    """End what still runs."""
    try:
        for member in crew:
            member.stop()
        _let_leave(crew, STOP_S)
    finally:
        for member in crew:
            member.stop(hard=True)
        for member in crew:
            member.close()


def _first_cause(crew: Sequence[_Member]) -> _Member:
    """Whose failure brought about the others': who died without a word, or else who first raised its own error."""
    failed = sorted((m for m in crew if m.failed), key=lambda m: (m.lost, m.failed_at))
    first = failed[0]
    near = [m for m in failed if m.lost == first.lost and m.failed_at <= first.failed_at + SETTLE_S]
    return min(near, key=lambda m: m.report is not None)


def _failure(member: _Member) -> UserError:
    report = member.report
    if not isinstance(report, Raised):
        return _failed(member, _end(member.process.exitcode))
    if report.user:
        return UserError(report.message)
    if report.kind != PeerLost.__name__:
        print(report.traceback, end="", file=sys.stderr)
    error = _failed(member, ": ".join(["raised " + report.kind, *report.message.splitlines()[:1]]))
    with suppress(Exception):  # its class may be unknown here
        error.__cause__ = pickle.loads(report.exception)
    return error


def _end(status: int | None) -> str:
    assert status is not None
    number = signal.SIGTERM if status == _Terminated.STATUS else -status
    return f"was killed by {signal.Signals(number).name}" if number > 0 else f"exited with status {status}"


def _check_pulses(running: Sequence[_Member], step_s: float, timeout_s: float) -> None:
    for member in running:
        member.feel(step_s, timeout_s)
    for member in running:
        if member.hangs(timeout_s):
            member.stop(hard=True)
            if member.report is None:  # otherwise its work is done
                _let_leave(running, LEAVE_S)
                state = STATES.get(member.state, member.state)
                raise _failed(member, f"hangs: no work done for {timeout_s:g} s (state: {state})", MORE_TIME)
    working = [member for member in running if member.report is None]
    if working and all(member.waiting and member.still_s >= timeout_s for member in working):
        waits = ", ".join(f"{member} waits for {member.waiting}" for member in working)
        text = f"a deadlock: for {timeout_s:g} s {waits}, and nobody works; {MORE_TIME}"
        raise WorkerFailed(text, working[0].rank, "deadlock")


def _failed(member: _Member, cause: str, remedy: str = REMEDY) -> WorkerFailed:
    _, doing, _ = member.status.told()
    during = f" during {doing}" if doing else ""
    remedy = IN_SCRIPT if doing == START else remedy
    return WorkerFailed(f"{member} {cause}{during}; {remedy}", member.rank, cause)
