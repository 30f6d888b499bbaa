"""Commands in processes of their own: as a user starts them, or forked from one that has imported torch already.

A fork saves the seconds that two interpreters take to import: the command's, and that of the server from which it forks
its workers. All else is the same: a session of its own, its environment, files for what it prints, signals.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any
from uuid import uuid4

from sglight.parallel.server import start_context
from tests.conftest import ROOT

MARK = "SGLIGHT_MARK"
Main = Callable[[list[str]], None]


class Command:
    """A command, ``python -m sglight`` by default, all processes of which can be found.

    Args:
        arguments: of the command. cwd: where it runs. program: what Python runs. env: variables beside those here.
    """

    def __init__(
        self, *arguments: str, cwd: Path, program: tuple[str, ...] = ("-m", "sglight"), **env: str
    ) -> None:
        self.mark = uuid4().hex
        self.files = [Path(tempfile.mkstemp(prefix=name)[1]) for name in ("out", "err")]
        self.environ = {
            **os.environ, MARK: self.mark, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **env,
        }  # fmt: skip
        self._start(program, list(arguments), cwd)

    def _start(self, program: tuple[str, ...], arguments: list[str], cwd: Path) -> None:
        with self.files[0].open("w") as out, self.files[1].open("w") as err:
            self.process: Any = subprocess.Popen(
                [sys.executable, *program, *arguments], cwd=cwd, env=self.environ, stdout=out, stderr=err,
                start_new_session=True,
            )  # fmt: skip
        self.pid: int = self.process.pid

    @property
    def status(self) -> int | None:
        """The exit status, once it has ended; negative for a signal that it did not answer."""
        status: int | None = self.process.poll()
        return status

    def wait(self, timeout_s: float) -> None:
        """Wait until it has ended."""
        self.process.wait(timeout_s)

    def end(self, timeout_s: float = 120) -> tuple[int, str, str]:
        """Status, output and errors, once it has ended."""
        self.wait(timeout_s)
        assert self.status is not None
        return self.status, *self.printed()

    def printed(self) -> list[str]:
        """Output and errors until now."""
        return [path.read_text() for path in self.files]

    def processes(self) -> dict[int, int]:
        """All of its processes, with their parents: they are in its session, or have its mark."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, parent, _, session, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
                marked = self.mark.encode() in (folder / "environ").read_bytes()
            except OSError:
                continue
            if state != "Z" and (marked or int(session) == self.pid):
                found[int(folder.name)] = int(parent)
        return found

    def workers(self) -> list[int]:
        """The workers by rank: forked from a server that the command has started."""
        found = self.processes()
        servers = [pid for pid, parent in found.items() if parent == self.pid]
        return sorted(pid for pid, parent in found.items() if parent in servers)

    def wait_until(self, condition: Callable[[], Any], timeout_s: float = 150) -> Any:
        """What the condition gives, once that is true."""
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            assert self.status is None, self.printed()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return found

    def no_process_is_left(self) -> bool:
        """Whether all have gone, at once or soon."""
        deadline = time.monotonic() + 5
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self.processes()

    def clear(self) -> None:
        """Kill what is left of it."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self.wait(10)
        for path in self.files:
            path.unlink()


class Forked(Command):
    """The same, forked from the server of this test process.

    Args:
        main: what is called with the arguments; a function at the top of a module.
    """

    def __init__(self, *arguments: str, cwd: Path, main: Main | None = None, **env: str) -> None:
        self.main = main or run_sglight
        super().__init__(*arguments, cwd=cwd, **env)

    def _start(self, program: tuple[str, ...], arguments: list[str], cwd: Path) -> None:
        self.process = start_context().Process(
            target=_become, args=(self.main, arguments, cwd, self.environ, self.files)
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def status(self) -> int | None:
        status: int | None = self.process.exitcode
        return status

    def wait(self, timeout_s: float) -> None:
        self.process.join(timeout_s)
        assert self.status is not None, (f"has not ended within {timeout_s} s", self.printed())


def _become(
    main: Main,
    arguments: list[str],
    cwd: Path,
    environ: dict[str, str],
    files: list[Path],
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[:0] = environ["PYTHONPATH"].split(os.pathsep)
    tempfile.tempdir = None
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with _forked_servers():
        start_context()  # before there is anything that workers should not inherit
        main(arguments)


def run_sglight(arguments: list[str]) -> None:
    """``python -m sglight``."""
    from sglight.__main__ import main

    sys.argv = ["sglight", *arguments]
    main()


def run_torchrun(arguments: list[str]) -> None:
    """``torchrun``, which then forks its workers."""
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    config, _, words = config_from_args(parse_args(["--start-method=fork", *arguments]))
    words = words[words.index("sglight") + 1 :]
    elastic_launch(config, run_sglight)(words)


@contextmanager
def _forked_servers() -> Iterator[None]:
    """Servers of multiprocessing that start within the block are forks of this process."""
    spawn = util.spawnv_passfds

    def fork(path: Any, words: list[Any], descriptors: tuple[int, ...]) -> int:
        if "forkserver" not in words[-1]:
            return spawn(path, words, descriptors)
        if pid := os.fork():
            return pid
        try:
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                if descriptor not in (0, 1, 2, *descriptors):
                    with suppress(OSError):
                        os.close(descriptor)
            for signum in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_DFL)
            forkserver._forkserver._lock = threading.Lock()  # held by this very call
            exec(words[-1], {})
        finally:
            os._exit(0)

    util.spawnv_passfds = fork
    try:
        yield
    finally:
        util.spawnv_passfds = spawn
