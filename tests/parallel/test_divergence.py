"""Workers of torchrun of which one diverges."""

from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest
import torch.distributed as dist

from sglight import signals
from sglight.errors import Diverged, PeerLost, Terminated
from sglight.parallel import divergence
from sglight.parallel.divergence import end_together, ending

FOUND = Diverged("the loss is nan")


@pytest.fixture(autouse=True)
def _signals_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ignore", lambda: None)  # threads may not, and it would outlast the test


@pytest.mark.parametrize("finder", [0, 1, 2])
@pytest.mark.parametrize("late_s", [0.0, 0.2])
def test_all_end_with_the_divergence_and_worker_0_tells_it(finder: int, late_s: float) -> None:
    store = dist.HashStore()

    def end(rank: int) -> BaseException:
        sleep(late_s if rank == finder else 0)
        return ending(FOUND if rank == finder else PeerLost("worker 1 has gone"), store, rank)

    with ThreadPoolExecutor(3) as pool:
        ends = list(pool.map(end, range(3)))
    assert isinstance(ends[0], Diverged)
    assert str(ends[0]) == "the loss is nan"
    assert [type(end) for end in ends[1:]] == [SystemExit, SystemExit]
    assert [end.code for end in ends[1:] if isinstance(end, SystemExit)] == [1, 1]


def test_a_signal_that_torchrun_sends_because_of_a_divergence_does_not_hide_it() -> None:
    store = dist.HashStore()
    store.set(divergence.MESSAGE, "the loss is nan")
    assert isinstance(ending(Terminated(15), store, 0), Diverged)


@pytest.mark.parametrize("error", [PeerLost("worker 1 has gone"), Terminated(15), KeyError("x")])
def test_an_error_without_a_divergence_stays(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(divergence, "ASK_S", 0.05)
    assert ending(error, dist.HashStore(), 0) is error


def test_a_worker_that_torchrun_ends_while_it_asks_keeps_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(_: float) -> None:
        raise Terminated(15)

    monkeypatch.setattr(divergence, "sleep", end)
    lost = PeerLost("worker 1 has gone")
    assert ending(lost, dist.HashStore(), 0) is lost


def test_one_that_diverges_tells_it_itself_if_worker_0_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(divergence, "STAY_S", 0.05)
    assert ending(FOUND, dist.HashStore(), 1) is FOUND


def test_the_end_has_no_signal_in_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    class Met:
        currsize = 1

    def met() -> tuple[dist.Store, int, int]:
        return store, 0, 2

    def work() -> None:
        raise Terminated(15)

    met.cache_info = Met  # type: ignore[attr-defined]
    store = dist.HashStore()
    store.set(divergence.MESSAGE, "the loss is nan")
    monkeypatch.setattr(divergence.remote, "rendezvous_env", met)
    with pytest.raises(Diverged, match="the loss is nan") as caught:
        end_together(work)
    assert caught.value.__context__ is None
