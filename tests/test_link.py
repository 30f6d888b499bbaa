"""What a process alone uses: queues for channels, and itself for all workers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from sglight.link import Alone, Known, LocalChannel, Receiver, Sender, Waits, alone

pytestmark = pytest.mark.timeout(60)


def test_a_local_channel_hands_on_the_tensors_themselves_in_order() -> None:
    channel = LocalChannel()
    sent = [torch.randn(2, i) for i in range(4)]
    for tensor in sent:
        channel.send(tensor)
    assert all(channel.receive(tensor.shape) is tensor for tensor in sent)


def test_a_worker_alone_is_all_workers() -> None:
    peers = Alone()
    assert (peers.rank, peers.size) == (0, 1)
    pending = peers.total([1.0, 2.5])
    assert pending.ready() and pending.result() == [1.0, 2.5]
    assert peers.gather("x") == peers.share("x") == ["x"]
    assert peers.broadcast("x") == "x"
    peers.barrier()
    peers.close()


def test_what_is_known_is_ready() -> None:
    assert Known([]).ready() and Known([]).result() == []


def test_a_process_alone_has_a_channel_each_way_at_every_boundary() -> None:
    placement = alone(4)
    assert placement.own == range(4)
    assert list(placement.states) == list(placement.gradients) == [0, 1, 2]
    channels = [*placement.states.values(), *placement.gradients.values()]
    assert len({id(channel) for channel in channels}) == 6


def test_waiting_is_announced_and_counted_even_if_it_fails() -> None:
    seen = []

    @contextmanager
    def waiting() -> Iterator[None]:
        seen.append("begins")
        yield
        seen.append("ends")

    waits = Waits()
    waits.waiting = waiting
    with waits.blocked():
        time.sleep(0.02)
    assert seen == ["begins", "ends"] and 0.02 <= waits.waited_s < 1
    before = waits.waited_s
    with suppress(KeyError), waits.blocked():
        time.sleep(0.02)
        raise KeyError
    assert waits.waited_s >= before + 0.02


def test_an_end_has_one_direction() -> None:
    class In(Sender):
        def send(self, tensor: torch.Tensor) -> None: ...

    class Out(Receiver):
        def receive(self, shape: object) -> torch.Tensor:
            return torch.zeros(1)

    with pytest.raises(AssertionError):
        In().receive([1])
    with pytest.raises(AssertionError):
        Out().send(torch.zeros(1))
