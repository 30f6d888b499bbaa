"""Worker processes: what they know and return, and how a run ends when one of them fails.

Torch is imported where it is needed: the scripts below, which import this, start sooner.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sglight.errors import PeerLost, Terminated, UserError
from sglight.parallel import supervisor
from sglight.parallel.launcher import Worker, WorkerFailed, current, launch
from sglight.parallel.worker import Status

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc"),
]


def worker() -> Worker:
    here = current()
    assert here is not None
    return here


def note(name: str, text: str = "") -> None:
    """Leave a file where the test finds it."""
    folder = Path(os.environ["SGLIGHT_NOTES"])
    (folder / f"{name}.tmp").write_text(text)
    (folder / f"{name}.tmp").rename(folder / name)


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for `note`, known to workers by their environment."""
    monkeypatch.setenv("SGLIGHT_NOTES", str(tmp_path))
    return tmp_path


def read(path: Path, within_s: float = 45.0) -> str:
    deadline = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody writes {path.name}"
        time.sleep(0.02)
    return path.read_text()


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z" and not is_ours(pid)


def is_ours(pid: int) -> bool:
    return str(os.getpid()) == Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]


def all_gone(pids: list[int], within_s: float = 5.0) -> bool:
    deadline = time.monotonic() + within_s
    while not all(gone(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(autouse=True)
def nothing_left(notes: Path) -> Iterator[None]:
    """Whatever happens: the workers have ended when `launch` does, and their folder has gone."""
    yield
    for path in notes.glob("worker-*"):
        pid, folder = path.read_text().split()
        assert all_gone([int(pid)], 0.0) and not Path(folder).exists()


def begin() -> Worker:
    """What the functions of these tests do first."""
    me = worker()
    note(f"worker-{me.rank}", f"{os.getpid()} {me.folder}")
    me.status.set_name(f"stage {me.rank}")
    me.status.set_doing("batch 17")
    return me


def pid_of_worker_1() -> int:
    """Waits until it has begun."""
    return int(read(Path(os.environ["SGLIGHT_NOTES"]) / "worker-1").split()[0])


# What workers know and return


def facts(*args: Any, **kwargs: Any) -> dict[str, Any]:
    import torch

    me = begin()
    (me.folder / f"here-{me.rank}").touch()
    while len(list(me.folder.iterdir())) < me.size:
        time.sleep(0.01)
    note(f"facts-{me.rank}", f"{me.rank} {me.size} {torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}")
    private = me.folder.stat().st_mode & 0o777 == 0o700
    return {"args": args, "kwargs": kwargs, "rank": me.rank, "private": private, "folder": str(me.folder)}


def test_workers_know_who_they_are_and_worker_0_answers(notes: Path) -> None:
    import torch

    answer = launch(facts, 1, torch.arange(3), name="x", workers=3, threads=2)
    assert answer["rank"] == 0 and answer["private"] and len(answer["folder"]) <= 70
    assert (
        answer["args"][0] == 1
        and answer["args"][1].tolist() == [0, 1, 2]
        and answer["kwargs"] == {"name": "x"}
    )
    assert [read(notes / f"facts-{rank}") for rank in range(3)] == [f"{rank} 3 2 2" for rank in range(3)]
    assert current() is None


def surroundings() -> dict[str, Any]:
    begin()
    return {
        "method": multiprocessing.get_start_method(),
        "env": dict(os.environ),
        "cwd": os.getcwd(),
        "ignores": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
    }


def test_each_launch_hands_on_environment_and_directory_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launch(surroundings, workers=1)  # the server runs, and has an environment of its own
    monkeypatch.setenv("SGLIGHT_NEW", "1")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    seen = launch(surroundings, workers=1)
    assert seen["env"] == dict(os.environ) and seen["cwd"] == str(tmp_path) and seen["ignores"]
    assert seen["method"] == multiprocessing.get_start_method()  # that of data loaders


def big() -> Any:
    import torch

    begin()
    return torch.ones(300_000)


def test_large_results_arrive() -> None:
    assert launch(big, workers=2).sum() == 300_000


def lingering() -> int:
    me = begin()
    if me.rank == 1:
        time.sleep(1.0)
        note("lingered")
    return me.rank


def test_worker_0_waits_for_the_others(notes: Path) -> None:
    assert launch(lingering, workers=2) == 0
    assert (notes / "lingered").exists()


# Failures


def failing(kind: str) -> None:
    me = begin()
    if me.rank == 1:
        if kind == "raise":
            raise ValueError("of\nseveral lines")
        if kind == "awkward":
            raise Awkward(1, 2)
        if kind == "exit":
            sys.exit(3)
        if kind == "_exit":
            os._exit(3)
        os.kill(os.getpid(), signal.Signals[kind])
    with me.status.waiting("something from worker 1"):
        time.sleep(0.3)
    raise PeerLost("worker 1 has gone")


class Awkward(Exception):
    """Pickles, but cannot be built from its message."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} {b}")


GO_ON = "during batch 17"


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("raise", "raised ValueError: of"),
        ("awkward", "raised Awkward: 1 2"),
        ("exit", "raised SystemExit: 3"),
        ("_exit", "exited with status 3"),
        ("SIGKILL", "was killed by SIGKILL"),
        ("SIGSEGV", "was killed by SIGSEGV"),
        ("SIGTERM", "was killed by SIGTERM"),
    ],
)
def test_the_worker_that_failed_is_named_and_not_those_that_lost_it(
    kind: str, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerFailed) as info:
        launch(failing, kind, workers=3)
    assert str(info.value) == f"worker 1 (stage 1) {cause} {GO_ON}"
    assert (info.value.rank, info.value.cause) == (1, cause)
    raised = kind in ("raise", "awkward", "exit")
    assert capsys.readouterr().err.count("Traceback") == raised
    causes = {"raise": ValueError, "exit": SystemExit, "SIGTERM": Terminated}
    assert isinstance(info.value.__cause__, causes.get(kind, type(None)))


def deaf() -> None:
    me = begin()
    if me.rank == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(pid_of_worker_1(), signal.SIGKILL)
    while True:
        time.sleep(0.01)


def test_those_that_notice_nothing_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LEAVE_S", 0.5)
    start = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"worker 1 .* SIGKILL"):
        launch(deaf, workers=2)
    assert supervisor.LEAVE_S + supervisor.STOP_S < time.monotonic() - start < 15.0


def dying_beside_an_error() -> None:
    if begin().rank == 0:
        pid_of_worker_1()
        raise RuntimeError("of a kind that nobody knows to be a consequence")
    time.sleep(0.3)
    os._exit(3)


def test_who_falls_silent_is_blamed_before_who_complains_at_about_the_same_time() -> None:
    with pytest.raises(WorkerFailed, match=r"worker 1 .* exited with status 3"):
        launch(dying_beside_an_error, workers=2)


def mistaken() -> None:
    begin()
    raise UserError("model.steps=0: at least 1")


def test_mistakes_of_the_user_stay_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as info:
        launch(mistaken, workers=2)
    assert type(info.value) is UserError and str(info.value) == "model.steps=0: at least 1"
    assert capsys.readouterr().err == ""


def own_error_late(consequence: str) -> None:
    if begin().rank == 0:
        pid_of_worker_1()
        if consequence == "gloo":
            raise RuntimeError(
                "[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4242"
            )
        try:
            raise PeerLost("it has gone")
        finally:
            if consequence == "context":
                raise KeyError("while tidying up")
    time.sleep(1.5)  # as callbacks do that save what there is
    raise ZeroDivisionError("the cause")


@pytest.mark.parametrize("consequence", ["lost", "context", "gloo"])
def test_an_error_that_comes_late_is_the_cause_of_lost_connections(consequence: str) -> None:
    with pytest.raises(WorkerFailed, match=r"worker 1 .* raised ZeroDivisionError: the cause"):
        launch(own_error_late, consequence, workers=2)


def all_lost(handled: bool) -> None:
    begin()
    try:
        raise PeerLost("it has gone")
    except PeerLost:
        if handled:
            raise KeyError("while handling it")  # noqa: B904
        raise


@pytest.mark.parametrize(
    ("handled", "cause"), [(False, "PeerLost: it has gone"), (True, "KeyError: 'while handling it'")]
)
def test_a_lost_connection_is_the_cause_if_nothing_else_is_known(
    handled: bool, cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(WorkerFailed, match=f"raised {cause}"):
        launch(all_lost, handled, workers=2)
    assert ("Traceback" in capsys.readouterr().err) == handled


def unpicklable() -> Iterator[int]:
    me = begin()
    return (i for i in range(3)) if me.rank == 0 else iter([1])


def test_workers_that_cannot_be_forked_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: supervisor.Member) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(supervisor.Member, "start", refuse)
    with pytest.raises(
        WorkerFailed, match=rf"has ended; .* may not execute {sys.executable}; or train in one"
    ):
        launch(print, workers=2)


def test_workers_are_forked_by_another_server_if_one_has_just_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    begin_process, tries = supervisor.Member.start, list[int]()

    def refuse_once(member: supervisor.Member) -> None:
        tries.append(member.rank)
        if len(tries) == 1:
            raise ConnectionRefusedError(111, "Connection refused")
        begin_process(member)

    monkeypatch.setattr(supervisor.Member, "start", refuse_once)
    assert launch(int, workers=1) == 0
    assert tries == [0, 0]


def test_results_and_tasks_that_do_not_pickle_are_refused() -> None:
    with pytest.raises(WorkerFailed, match=r"worker 0 .* the result does not pickle: .*generator"):
        launch(unpicklable, workers=2)
    with pytest.raises(UserError, match=r"cannot go to worker processes.*trainer.devices=1"):
        launch(lambda: 0, workers=2)


def test_a_result_is_worth_nothing_if_another_worker_fails() -> None:
    with pytest.raises(WorkerFailed, match=r"worker 1 .* raised KeyError"):
        launch(late_failure, workers=2)


def late_failure() -> int:
    me = begin()
    if me.rank == 1:
        time.sleep(0.8)
        raise KeyError("late")
    return 1


def test_failures_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(WorkerFailed("worker 1 died", 1, "died")))
    assert (str(error), error.rank, error.cause) == ("worker 1 died", 1, "died")


# Hanging


def sleeping() -> None:
    me = begin()
    if me.rank == 0:
        with me.status.waiting("the state of batch 17 from worker 1"):
            time.sleep(1e6)
    time.sleep(1e6)


def stopped() -> None:
    me = begin()
    if me.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    with me.status.waiting("worker 1"):
        time.sleep(1e6)


def asleep_at_the_end() -> None:
    """A report is sent, but the process does not end."""
    import threading

    threading.Thread(target=time.sleep, args=(1e6,)).start()
    begin()


@pytest.mark.parametrize(("function", "state"), [(sleeping, "sleeping"), (stopped, "stopped")])
def test_a_worker_that_does_nothing_hangs(
    function: Callable[[], None], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LEAVE_S", 0.5)
    start = time.monotonic()
    with pytest.raises(WorkerFailed) as info:
        launch(function, workers=2, idle_timeout_s=1.0)
    assert str(info.value) == (
        f"worker 1 (stage 1) hangs: no work done for 1 s (state: {state}) {GO_ON}; "
        "allow more time with trainer.idle_timeout_s"
    )
    assert time.monotonic() - start < 15.0


def test_a_worker_that_has_reported_may_not_keep_the_others_from_ending() -> None:
    assert launch(asleep_at_the_end, workers=2, idle_timeout_s=1.0) is None


def deadlocked() -> None:
    me = begin()
    if me.rank == 2:
        return
    with me.status.waiting(f"the state of batch 17 from worker {1 - me.rank}"):
        time.sleep(1e6)


def test_workers_that_wait_for_each_other_are_a_deadlock() -> None:
    with pytest.raises(WorkerFailed) as info:
        launch(deadlocked, workers=3, idle_timeout_s=1.0)
    assert str(info.value).startswith(
        "a deadlock: for 1 s worker 0 (stage 0) waits for the state of batch 17 from worker 1, "
        "worker 1 (stage 1) waits for the state of batch 17 from worker 0, and nobody works; allow more time with"
    )
    assert (info.value.rank, info.value.cause) == (0, "deadlock")


def busy(seconds: float) -> str:
    """One computes, one waits for it, and one for a process of its own."""
    me = begin()
    if me.rank == 0:
        with me.status.waiting("worker 1"):
            read(me.folder / "done")
    elif me.rank == 1:
        compute(seconds)
        (me.folder / "done").touch()
    else:
        subprocess.run([sys.executable, "-c", COMPUTE.format(seconds=seconds)], check=True)
    return "done"


COMPUTE = """
import time
end = time.monotonic() + {seconds}
while time.monotonic() < end: pass
"""


def compute(seconds: float) -> None:
    exec(COMPUTE.format(seconds=seconds))


def test_working_is_not_hanging_nor_is_waiting_for_who_works() -> None:
    assert launch(busy, 4.0, workers=3, idle_timeout_s=2.0) == "done"


def noticing_late(seconds: float) -> str:
    """One computes and returns at once, and one that waits for it looks only now and then."""
    me = begin()
    if me.rank == 1:
        compute(seconds)
        (me.folder / "done").touch()
        return "done"
    with me.status.waiting("worker 1"):
        while not (me.folder / "done").exists():
            time.sleep(0.8)
    return "done"


def test_who_has_just_ended_is_not_missed_by_those_who_waited_for_it() -> None:
    assert launch(noticing_late, 3.6, workers=2, idle_timeout_s=2.0) == "done"


def dozing() -> None:
    begin()
    time.sleep(1.0)


def test_a_supervisor_that_was_suspended_has_seen_nobody_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "monotonic", lambda: 20.0 * time.monotonic())
    launch(dozing, workers=1, idle_timeout_s=6.0)


# What it costs


def test_telling_what_one_does_costs_next_to_nothing() -> None:
    status = Status()
    start = time.perf_counter()
    for i in range(10_000):
        status.set_doing(f"batch {i}")
    assert (time.perf_counter() - start) / 10_000 < 10e-6  # 0.4e-6 on a quiet machine
    status.set_doing("ä" * 300)
    with status.waiting("a"), status.waiting("b"):
        assert status.read() == ("", "ä" * 100, "b")
    assert status.read().waiting == ""


# From a script

SCRIPT = """
import os, signal, sys, time
from sglight.parallel import launcher, server
from tests.parallel.test_launcher import begin, note

server.PRELOAD[:] = sys.argv[1:]

def short():
    deaf = signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return __name__, deaf

def long():
    me = begin()
    note(f"server-{me.rank}", str(os.getppid()))
    try:
        time.sleep(1e6)
    finally:
        note(f"flushed-{me.rank}")

if __name__ == "__main__":
    print(launcher.launch(short, workers=2), flush=True)
    launcher.launch(long, workers=2)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the script has its temporary files: not as deep as `tmp_path`, which is too long for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def start(notes: Path, temporary: Path) -> Iterator[Start]:
    """Starts a script, in a group of processes of its own, that launches something twice, the second time for ever."""
    path = notes / "script.py"
    path.write_text(SCRIPT)
    started = []

    def start(*preload: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(path), *preload], cwd=notes,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def processes(notes: Path) -> list[int]:
    """The server and both workers, once they are at the second piece of work."""
    server, _ = (int(read(notes / f"server-{rank}")) for rank in range(2))
    return [server, *(int(read(notes / f"worker-{rank}").split()[0]) for rank in range(2))]


def interrupt(script: subprocess.Popen[str]) -> str:
    """Press Ctrl-C; returns what the script has printed, once nobody can print any more."""
    os.killpg(script.pid, signal.SIGINT)
    out, err = script.communicate(timeout=5)
    assert script.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1 and "KeyboardInterrupt" in err
    return out


def test_nothing_outlives_a_parent_that_is_killed(start: Start, notes: Path, temporary: Path) -> None:
    script = start("sglight.parallel.launcher")
    pids = processes(notes)
    script.kill()
    script.wait()
    assert all_gone(pids)
    assert (notes / "flushed-0").exists() and (notes / "flushed-1").exists()
    assert not list(temporary.iterdir())


def test_ctrl_c_ends_all_at_once_and_quietly(start: Start, notes: Path, temporary: Path) -> None:
    script = start("sglight.parallel.launcher")
    pids = processes(notes)
    assert [path.name[:8] for path in temporary.iterdir()] == ["sglight-"]
    out = interrupt(script)
    assert not list(temporary.iterdir())
    assert all_gone(pids) and (notes / "flushed-0").exists()
    assert out == "('__mp_main__', True)\n"


IMPORT = """
import os, time
from pathlib import Path
Path("i").write_text(f"{os.getpid()} {len(os.listdir('/proc/self/task'))}")
os.rename("i", "importing")
time.sleep(1e6)
"""


def test_ctrl_c_does_not_wait_for_imports_either(start: Start, notes: Path) -> None:
    (notes / "slow.py").write_text(IMPORT)
    script = start("numpy", "slow")
    server, threads = read(notes / "importing").split()
    interrupt(script)
    assert all_gone([int(server)])
    assert threads == "1"  # a server without others has nothing to lose when it forks


@pytest.mark.skipif(sys.platform != "linux", reason="Linux's")
def test_a_server_that_still_imports_does_not_outlive_its_parent(start: Start, notes: Path) -> None:
    (notes / "slow.py").write_text(IMPORT)
    script = start("slow")
    server, _ = read(notes / "importing").split()
    script.kill()
    assert all_gone([int(server)], within_s=2.0)


EARLY = """
import os, signal
from multiprocessing import forkserver
from sglight.parallel import launcher, server

server.PRELOAD[:] = ["slow"]
ensure_running = forkserver.ensure_running

def interrupted():
    ensure_running()
    print(forkserver._forkserver._forkserver_pid, flush=True)
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    forkserver.ensure_running = interrupted
    launcher.launch(print, workers=1)
"""


def test_ctrl_c_between_the_server_and_its_first_worker_ends_the_server(start: Start, notes: Path) -> None:
    (notes / "slow.py").write_text(IMPORT)
    (notes / "script.py").write_text(EARLY)
    script = start()
    out, err = script.communicate(timeout=20)
    assert script.returncode == -signal.SIGINT and "KeyboardInterrupt" in err
    assert all_gone([int(out)])
