"""Does a run survive whatever ends it? Kills runs at random and goes on with them; damages checkpoints at random.

    python benchmarks/ends.py kills --count 100     # about 15 s each on two cores
    python benchmarks/ends.py flips --count 200     # seconds

``kills``: runs by synthetic gradients, levels, variable distribution and late gradients, alone and on two workers, get
SIGTERM, SIGINT, SIGHUP or SIGKILL, they, one of their workers or all their processes, as they start, train, write a
checkpoint, validate, or test, the last epoch behind them. Each must end within 15 s with a true status and leave no
process and no temporary file behind; gone on with, it must end with the parameters and the metrics of a run that nobody
killed, bit for bit. Behind SIGKILL nobody is left to remove temporary files: then going on must have removed them.

``flips``: a bit of a checkpoint is turned, or its end is cut off; the command must refuse it in one sentence.

The exit status is 1 if anything was otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from multiprocessing import util
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

import sglight.__main__ as command
import sglight.experiment  # noqa: F401 (runs, which are forked from here, start at once)
from sglight import status
from sglight.archive import read_plain
from sglight.data.loader import BatchLoader
from sglight.data.planar import PlanarData

END_S, RUN_S, EPOCHS = 15.0, 120.0, 4
STRATEGIES = ("dni", "multilevel", "pvd", "delayed")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
MOMENTS = ("start", "training", "checkpoint", "validation", "after")
# In the environment of all processes of a run: its own mark, and the file that is there while it validates.
MARK, VALIDATES = "SGLIGHT_ENDS", "SGLIGHT_ENDS_VALIDATES"
SMALL = (
    "dataset=ellipse", "dataset._target_=benchmarks.ends.Shown", "dataset.train_points=600", "dataset.batch_size=16",
    "dataset.val_points=2000", "dataset.test_points=2000", "dataset.eval_batch_size=20", "model.channels=4",
    "model.steps=4", f"trainer.max_epochs={EPOCHS}", "trainer.accelerator=cpu", "trainer.threads=1",
    "callbacks.progress.enabled=false", "callbacks.figures.enabled=false", "callbacks.timeline.enabled=false",
    "trainer.idle_timeout_s=30",
)  # fmt: skip
SAME = ("test/acc", "test/loss", "val/acc", "val/loss", "run/steps", "run/epochs", "run/config_hash")


class Shown(PlanarData):
    """Ellipses whose validation can be seen from outside; that and the test take a while."""

    @override
    def val_dataloader(self) -> BatchLoader:
        return _as(ShownLoader, super().val_dataloader())

    @override
    def test_dataloader(self) -> BatchLoader:
        return _as(SlowLoader, super().test_dataloader())


def _as(kind: type[BatchLoader], loader: BatchLoader) -> BatchLoader:
    loader.__class__ = kind
    return loader


class SlowLoader(BatchLoader):
    @override
    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            time.sleep(0.003)
            yield batch


class ShownLoader(SlowLoader):
    @override
    def __iter__(self) -> Iterator[Any]:
        shown = Path(os.environ[VALIDATES])
        shown.touch()
        try:
            yield from super().__iter__()
        finally:
            shown.unlink(missing_ok=True)


class Run:
    """A command in a process of its own, forked from this one.

    Args:
        folder: of the run. words: overrides. temporary: where its temporary files are; by default a folder of its own.
    """

    def __init__(self, folder: Path, *words: str, temporary: Path | None = None) -> None:
        self.folder, self.mark = folder, f"{os.getpid()}-{time.monotonic_ns()}"
        self.temporary = temporary or Path(tempfile.mkdtemp(prefix="t", dir=folder.parent))
        self.log, self.validates = (folder.parent / f"{folder.name}.{what}" for what in ("log", "validates"))
        self.code: int | None = None
        self.pid = os.fork()
        if not self.pid:
            try:
                self._command([*SMALL, f"hydra.run.dir={folder}", *words])
            finally:
                os._exit(1)

    def _command(self, words: list[str]) -> None:
        code = 1
        try:
            os.setsid()
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {
                MARK: self.mark, VALIDATES: str(self.validates), "TMPDIR": str(self.temporary),
            }  # fmt: skip
            tempfile.tempdir = None
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.argv = ["sglight", *words]
            command.main()
            code = 0
        except SystemExit as error:
            if isinstance(error.code, str):
                os.write(2, f"{error.code}\n".encode())
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        finally:
            sys.stdout.flush()
            util._exit_function()  # what a process does that was not forked
            os._exit(code)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within so many seconds."""
        deadline = time.monotonic() + seconds
        while self.code is None and time.monotonic() < deadline:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(code)
            else:
                time.sleep(0.01)
        return self.code is not None

    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text() if self.log.is_file() else ""

    def processes(self) -> list[int]:
        """The processes of the run, its workers and their server among them."""
        found, mark = [], f"{MARK}={self.mark}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
            except OSError:
                continue
        return found

    @cached_property
    def workers(self) -> list[int]:
        """Those of its processes that train, when there are several: the server has forked them."""
        while not self.wait(0):
            parents = {pid: _parent(pid) for pid in self.processes()}
            found = sorted(pid for pid, parent in parents.items() if parent in parents and parent != self.pid)
            if len(found) == 2:
                return found
            time.sleep(0.01)
        return []

    def left(self, excused: tuple[str, ...] = ()) -> list[str]:
        """What it has left behind but should not, `END_S` seconds after its end if there is something till then.

        Args:
            excused: parts of the names of files that may be left.
        """
        deadline = time.monotonic() + END_S
        while (left := self._left(excused)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def _left(self, excused: tuple[str, ...]) -> list[str]:
        files = map(str, (*self.folder.rglob("*.tmp"), *self.temporary.iterdir()))
        processes = [_described(pid) for pid in self.processes()]
        return [name for name in files if not any(part in name for part in excused)] + processes


def _described(pid: int) -> str:
    """A process with its state and command line, as far as it is still there."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return f"process {pid} (just gone)"
    return f"process {pid} ({state}: {words.strip()[:200]})"


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


# How long a moment lasts, for a signal somewhere within it.
LASTS_S = {"training": 0.05, "checkpoint": 0.0, "validation": 0.3, "after": 0.6}


def wait_for(moment: str, run: Run, generator: random.Random) -> bool:
    """Wait until a run is there, or has ended; whether it is there still."""
    if moment == "start":
        return not run.wait(generator.uniform(0.0, 3.0))
    until = time.monotonic() + RUN_S
    skipped = 0 if moment == "after" else generator.randrange(EPOCHS - 1)
    there = False
    while not run.wait(0) and time.monotonic() < until:
        before, there = there, _is_there(moment, run)
        if there and not before:
            skipped -= 1
            if skipped < 0:
                run.wait(generator.uniform(0.0, LASTS_S[moment]))
                return not run.wait(0) and (moment == "checkpoint" or _is_there(moment, run))
        time.sleep(0.0002)
    return False


def _is_there(moment: str, run: Run) -> bool:
    folder = run.folder / "checkpoints"
    last = folder / "last.ckpt"
    if moment == "training":
        return last.exists() and not run.validates.exists()
    if moment == "validation":
        return run.validates.exists()
    if moment == "checkpoint":
        return any(folder.glob("*.tmp"))
    return last.exists() and not (run.folder / "metrics.json").exists() and _epoch(last) == EPOCHS - 1


def _batches(run: Run) -> int:
    """Of the last checkpoint."""
    try:
        return int(read_plain(run.folder / "checkpoints/last.ckpt", "it")["global_step"])
    except ValueError:
        return 0


def _epoch(path: Path) -> int:
    try:
        return int(read_plain(path, "it")["epoch"])
    except ValueError:
        return -1


def kill(run: Run, victim: str, signum: int, moment: str, generator: random.Random) -> tuple[bool, list[str]]:
    """Send a signal; whether it came at that moment, and what was wrong with the end."""
    workers = run.workers if victim == "worker" and moment != "start" else []
    hit = wait_for(moment, run, generator)
    target = generator.choice(workers) if workers else run.pid
    over = run.wait(0)
    if not over:
        (os.killpg if victim == "group" else os.kill)(target, signum)
    wrong = []
    if target != run.pid and signum == signal.SIGINT and not over:
        if not run.wait(RUN_S):
            wrong.append("a worker minds Ctrl-C")
    elif not run.wait(END_S):
        wrong.append(f"has not ended within {END_S} s")
        os.kill(run.pid, signal.SIGKILL)
        run.wait(END_S)
    hard = signum == signal.SIGKILL and target == run.pid
    # The server of workers sees what has become of the command once it has imported torch. Nobody is left to clean up
    # behind SIGKILL: the next run does.
    wrong += run.left((".tmp", "/sglight-") if hard else ())
    told, code = status.read(run.folder).get("status"), run.code
    right = {0: ("finished",), 1: ("failed",)} | {-s: ("stopped", None, "finished") for s in SIGNALS}
    if told not in right.get(code or 0, ("interrupted", None)):
        wrong.append(f"status {told} after exit status {code}")
    # A run may end before the signal comes; and one that comes before the command answers any ends the process.
    right_codes = {0, 128 + signum} | ({-signum} if moment == "start" or hard else set())
    if target != run.pid:
        right_codes = {0, {signal.SIGKILL: 1, signal.SIGINT: 0}.get(signal.Signals(signum), 128 + signum)}
    if not over and code not in right_codes:
        wrong.append(f"exit status {code} after signal {signum}")
    return hit and not over, wrong


def go_on(run: Run, words: tuple[str, ...], reference: Path) -> list[str]:
    """Bring a killed run to its end, and tell in what it differs from one that nobody killed."""
    wrong: list[str] = []
    if not (run.folder / "metrics.json").is_file():
        ckpt = ["ckpt=last"] if (run.folder / "checkpoints/last.ckpt").exists() else []
        again = Run(run.folder, *words, *ckpt, temporary=run.temporary)
        if not again.wait(RUN_S) or again.code != 0:
            return [f"going on ended with {again.code}: {again.said()[-600:]}"]
        wrong = again.left()
    a, b = (
        torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for f in (reference, run.folder)
    )
    wrong += [name for name in a if not torch.equal(a[name], b[name])]
    one, other = (json.loads((f / "metrics.json").read_text()) for f in (reference, run.folder))
    return [*wrong, *(key for key in SAME if one[key] != other[key])]


def kills(count: int, seed: int, share: float) -> bool:
    """Kill so many runs; whether all was right."""
    generator, told = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as where:
        references: dict[tuple[str, ...], Path] = {}
        for k in range(count):
            strategy = STRATEGIES[k % len(STRATEGIES)]
            several = generator.random() < share
            words = (f"strategy={strategy}", f"trainer.devices={2 if several else 1}")
            if words not in references:
                references[words] = Path(where, f"reference-{strategy}-{several}")
                if not Run(references[words], *words).wait(RUN_S):
                    raise TimeoutError(f"{words} takes too long")
            signum, moment = generator.choice(SIGNALS), MOMENTS[k // len(STRATEGIES) % len(MOMENTS)]
            victim = generator.choice(("parent", "worker", "group") if several else ("parent", "group"))
            run = Run(Path(where, str(k)), *words)
            hit, wrong = kill(run, victim, signum, moment, generator)
            state, batches = status.read(run.folder).get("status", "nothing yet"), _batches(run)
            told[f"in {moment}"] += hit
            wrong += go_on(run, words, references[words])
            told["wrong" if wrong else state] += 1
            name = signal.Signals(signum).name
            print(
                f"{k}: {' '.join(words)} {name} to {victim}, {'in' if hit else 'beside'} {moment}: "
                f"{state} with {run.code}, {batches} batches; {'; '.join(wrong)}",
                flush=True,
            )
    print(dict(told))
    return not told["wrong"]


def flips(count: int, seed: int) -> bool:
    """Damage a checkpoint so many times; whether each was refused in a sentence."""
    generator, refused = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as where:
        first = Run(Path(where, "a"))
        if not first.wait(RUN_S) or first.code:
            raise RuntimeError(first.said())
        path = Path(where, "a/checkpoints/last.ckpt")
        whole = path.read_bytes()
        for k in range(count):
            place = generator.randrange(len(whole))
            changed = bytearray(whole)
            if k % 2:
                del changed[place:]
            else:
                changed[place] ^= 1 << generator.randrange(8)
            path.write_bytes(changed)
            run = Run(Path(where, f"b{k}"), f"ckpt={path}", f"mode={generator.choice(('fit', 'test'))}")
            run.wait(RUN_S)
            lines = run.said().splitlines()
            good = run.code == 1 and len(lines) == 1 and "is damaged" in lines[0]
            refused += good
            if not good:
                print(f"{'cut at' if k % 2 else 'flipped'} {place} of {len(whole)}: {run.code} {lines[-3:]}")
    print(f"{refused} of {count} refused in a sentence")
    return refused == count


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kills", "flips"))
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.5, help="of runs on two workers")
    options = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, also in the runs
    fine: Any = (
        kills(options.count, options.seed, options.share)
        if options.what == "kills"
        else flips(options.count, options.seed)
    )
    sys.exit(not fine)


if __name__ == "__main__":
    main()
