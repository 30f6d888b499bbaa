"""Tensors by way of host memory and a thread at either end: what comes out, when an end waits, how they part."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sglight.errors import PeerLost
from sglight.parallel.layout import DTYPES
from sglight.parallel.remote import GroupReceiver, GroupSender, gloo, rendezvous_file
from sglight.parallel.staging import Line, StagedReceiver, StagedSender
from tests.parallel.workers import Watch, assert_same, closing, resident_mb, working

pytestmark = pytest.mark.timeout(60)


class Queue(Line):
    """A line within the process, which breaks when it is told to."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[Tensor | None] = SimpleQueue()

    def put(self, data: Tensor) -> None:
        self.queue.put(data.clone())

    def get(self, data: Tensor) -> None:
        arrived = self.queue.get()
        if arrived is None:
            raise PeerLost
        assert len(arrived) == len(data)
        data.copy_(arrived)

    def hang_up(self) -> None:
        self.queue.put(None)


@contextmanager
def pair(buffers: int = 2, **kwargs: Any) -> Iterator[tuple[StagedSender, StagedReceiver]]:
    line = Queue()
    sender, receiver = StagedSender(line, buffers, **kwargs), StagedReceiver(line, buffers, **kwargs)
    with closing(sender, receiver):
        yield sender, receiver


# What comes out


@settings(max_examples=50, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(0, 5), max_size=6), seed=st.integers(0, 99))
def test_layouts_and_values_are_kept(data: st.DataObject, shape: list[int], seed: int) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(seed)
    tensor = (100 * torch.randn(shape)).to(dtype).permute(order)
    with pair() as (sender, receiver):
        sender.send(tensor)
        assert_same(receiver.receive(tensor.shape), tensor)


def test_a_received_tensor_is_a_leaf_and_valid_until_the_next() -> None:
    with pair() as (sender, receiver):
        for i in range(4):
            sender.send(torch.full((5,), float(i), requires_grad=True))
        first = receiver.receive((5,))
        time.sleep(0.1)
        assert first.sum() == 0 and not first.requires_grad
        first.requires_grad_().sum().backward()
        assert [receiver.receive((5,))[0].item() for _ in range(3)] == [1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_a_gpu_pass_through_pinned_memory() -> None:
    with pair(device="cuda") as (sender, receiver):
        for i in range(10):
            image = torch.full((3, 2, 4, 5), float(i), device="cuda").to(memory_format=torch.channels_last)
            for tensor in (image, image[:, :1]):
                sender.send(tensor)
                received = receiver.receive(tensor.shape)
                assert received.is_cuda and torch.equal(received, tensor)


# Between processes


def groups(folder: Path, rank: int) -> list[Any]:
    store = rendezvous_file(folder, rank, 2)
    return [gloo(store, rank, 2, name, local=True) for name in ("down", "up")]


def echo(folder: Path, shapes: list[Sequence[int]]) -> float:
    """Send back whatever comes."""
    down, up = groups(folder, 1)
    receiver, sender = GroupReceiver(down), GroupSender(up)
    with closing(sender, receiver):
        for shape in shapes:
            sender.send(receiver.receive(shape))
        return resident_mb()


@contextmanager
def meeting(folder: Path, target: Callable[..., Any], *args: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Channels to and from a process, ended with this block."""
    with working(target, folder, *args) as worker, ExitStack() as stack:
        down, up = groups(folder, 0)
        sender = GroupSender(down, peer="worker 1")
        stack.callback(sender.close)
        receiver = GroupReceiver(up, peer="worker 1")
        stack.callback(receiver.close)
        yield worker, sender, receiver


def test_tensors_cross_processes_in_order(tmp_path: Path) -> None:
    tensors = []
    for i in range(60):
        dtype = (torch.float32, torch.float64, torch.bfloat16)[i % 3]
        tensor = torch.randn(1 + i % 7, 3, 5, 1 + i % 4).to(dtype)
        tensors.append(tensor.to(memory_format=torch.channels_last) if i % 2 else tensor)
    with meeting(tmp_path, echo, [tensor.shape for tensor in tensors]) as (worker, sender, receiver):
        for tensor in tensors:
            sender.send(tensor)
            assert_same(receiver.receive(tensor.shape), tensor)
        worker.result()
        start = time.perf_counter()
    assert time.perf_counter() - start < 1  # both have closed: no waiting


def test_both_may_send_before_either_receives(tmp_path: Path) -> None:
    with meeting(tmp_path, echo, [(20_000,)] * 12) as (_, sender, receiver):
        for i in range(0, 12, 2):
            sender.send(torch.full((20_000,), float(i)))
            sender.send(torch.full((20_000,), float(i + 1)))
            assert receiver.receive((20_000,))[-1] == i
            assert receiver.receive((20_000,))[-1] == i + 1


def test_memory_does_not_grow(tmp_path: Path) -> None:
    sizes = torch.randint(0, 200_000, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    with meeting(tmp_path, echo, [(size,) for size in sizes]) as (worker, sender, receiver):
        before = resident_mb()
        for i, size in enumerate(sizes):
            sender.send(torch.full((size,), float(i)))
            assert (receiver.receive((size,)) == i).all()
        assert resident_mb() < before + 30
        worker.result()


def sleep_with_open_ends(folder: Path) -> None:
    down, up = groups(folder, 1)
    receiver, sender = GroupReceiver(down), GroupSender(up)
    sender.send(torch.ones(5))
    receiver.receive((5,))
    time.sleep(100)


def send_until_it_fails(sender: GroupSender, sent: list[Tensor]) -> None:
    while True:
        sender.send(torch.ones(5))
        sent.append(torch.ones(5))


def test_a_sender_far_ahead_waits_and_notices_the_death_of_the_other(tmp_path: Path) -> None:
    with meeting(tmp_path, sleep_with_open_ends) as (worker, sender, _):
        watch = Watch()
        sender.waiting = watch
        threading.Timer(0.8, worker.process.kill).start()
        start = time.perf_counter()
        sent: list[Tensor] = []
        with pytest.raises(PeerLost, match="worker 1 has gone"):
            send_until_it_fails(sender, sent)
        assert len(sent) <= 5  # two in buffers at either end, a header under way
        assert watch.times > 0 and sender.waited_s > 0.1 and time.perf_counter() - start < 3


def test_a_sender_with_room_notices_the_death_as_well(tmp_path: Path) -> None:
    with meeting(tmp_path, sleep_with_open_ends) as (worker, sender, _):
        worker.kill()
        with suppress(PeerLost):
            sender.send(torch.ones(5))
        time.sleep(0.3)
        with pytest.raises(PeerLost, match="worker 1 has gone"):
            sender.send(torch.ones(5))


def test_a_receiver_gets_what_arrived_and_then_notices_the_death(tmp_path: Path) -> None:
    with meeting(tmp_path, sleep_with_open_ends) as (worker, _, receiver):
        threading.Timer(0.5, worker.process.kill).start()
        start = time.perf_counter()
        assert receiver.receive((5,)).sum() == 5
        with pytest.raises(PeerLost, match="worker 1 has gone"):
            receiver.receive((5,))
        with pytest.raises(PeerLost, match="worker 1 has gone"):
            receiver.receive((5,))
        assert receiver.waited_s > 0.1 and time.perf_counter() - start < 3


def test_an_end_closes_though_the_other_does_not(tmp_path: Path) -> None:
    with meeting(tmp_path, sleep_with_open_ends) as (_, sender, receiver):
        for _ in range(4):
            sender.send(torch.ones(5))
        start = time.perf_counter()
        sender.close()
        receiver.close()
        assert time.perf_counter() - start < 6
        assert not sender._thread.is_alive() and not receiver._thread.is_alive()


# When an end waits, or is out of step


def test_a_receiver_waits_for_a_tensor() -> None:
    watch = Watch()
    with pair(waiting=watch) as (sender, receiver):
        threading.Timer(0.2, sender.send, [torch.ones(3)]).start()
        assert receiver.receive((3,)).sum() == 3
        assert watch.times == 1 and 0.1 < receiver.waited_s < 5
        assert sender.waited_s == 0 < sender.moved_s


def test_a_signal_is_handled_while_an_end_waits() -> None:
    def handler(*_: object) -> None:
        raise InterruptedError

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with pair() as (sender, receiver):
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(InterruptedError):
                receiver.receive((3,))
            sender.send(torch.ones(3))
            assert receiver.receive((3,)).sum() == 3
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_a_closed_sender_is_gone_and_what_it_sent_arrives() -> None:
    with pair() as (sender, receiver):
        sender.send(torch.ones(3))
        sender.close()
        assert receiver.receive((3,)).sum() == 3
        with pytest.raises(PeerLost):
            receiver.receive((3,))


def test_another_shape_than_expected_is_an_error_that_names_both() -> None:
    with pair() as (sender, receiver):
        sender.send(torch.ones(2, 3))
        with pytest.raises(PeerLost, match=r"the other worker sent \[2, 3\] where \[3, 2\] was expected"):
            receiver.receive((3, 2))
