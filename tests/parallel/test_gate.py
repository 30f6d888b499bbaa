"""Workers that are batches apart end behind the same one, and a run of several goes on from there bit for bit."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch

from sglight import signals
from sglight.compat.multiprocessing import forkserver_pid
from sglight.errors import Terminated
from sglight.parallel.gate import Gate
from tests.test_experiment import metrics, weights

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("seed", range(20))
def test_all_end_at_the_same_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Whoever is asked, and however far apart they are: each needs for point p that all have come to p - 3."""
    monkeypatch.setattr(signals, "pass_on", lambda signum: None)
    workers, points, random = 2 + seed % 3, 60, Random(seed)
    asked = {random.randrange(workers): random.randrange(points) for _ in range(1 + seed % 2)}
    reached, ends = [0] * workers, [0] * workers
    pauses = [[random.choice((0, 0, 1e-3)) for _ in range(points)] for _ in range(workers)]

    def work(rank: int) -> None:
        gate = Gate(tmp_path / "gate", rank, workers)
        for point in range(1, points + 1):
            while min(reached) < point - 3:
                time.sleep(1e-4)
            time.sleep(pauses[rank][point - 1])
            reached[rank] = point
            signum = 15 if asked.get(rank, points) < point else None
            if gate.stops(point, signum) is not None:
                ends[rank] = point
                return

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert len(set(ends)) == 1
    assert ends[0] > min(asked.values()) or max(asked.values()) + 3 >= points


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return sorted(found)


@pytest.fixture
def answered() -> Iterator[None]:
    """Signals are answered as in the command."""
    before = signals.answer()
    yield
    signals.answer()
    signals.restore(before)


@pytest.mark.skipif(not Path("/proc").exists(), reason="Linux's")
@pytest.mark.parametrize(
    ("strategy", "whom", "signum"),
    [
        ("delayed", "command", signal.SIGTERM),
        ("dni", "worker", signal.SIGHUP),
        ("pvd", "all", signal.SIGTERM),
    ],
)
def test_a_signal_to_any_process_of_a_run_leaves_a_checkpoint_of_all(
    start: Callable[..., float], tmp_path: Path, answered: None, strategy: str, whom: str, signum: int
) -> None:
    common = (
        f"strategy={strategy}",
        "trainer.max_epochs=2",
        "dataset.train_points=1600",
        "dataset.batch_size=16",
    )
    last = tmp_path / "killed/checkpoints/last.ckpt"

    def send() -> None:
        while not last.exists():
            time.sleep(1e-3)
        own = [] if whom == "worker" else [os.getpid()]
        workers = [] if whom == "command" else children_of(forkserver_pid())[-2:]
        for pid in own + (workers[:1] if whom == "worker" else workers):
            os.kill(pid, signum)

    threading.Thread(target=send, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(Terminated) as info:
        start(tmp_path / "killed", *common, "trainer.devices=2")
    assert info.value.signum == signum
    assert time.monotonic() - began < 60
    assert not children_of(forkserver_pid())
    assert 100 < torch.load(last, weights_only=True)["global_step"] < 200
    signals.answer()
    start(tmp_path / "killed", *common, f"ckpt={last}")
    start(tmp_path / "whole", *common)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for name in ("test/acc", "test/loss", "val/acc", "run/steps"):
        assert metrics(tmp_path / "whole")[name] == metrics(tmp_path / "killed")[name]
