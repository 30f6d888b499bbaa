"""Tensors through shared memory: what comes out, when an end waits, what is left of an end that has gone."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglight.errors import PeerLost
from sglight.parallel.layout import DTYPES
from sglight.parallel.shared import MAX_SLOTS, SharedReceiver, SharedSender, connect
from tests.parallel.workers import Watch, assert_same, closing, descriptors, resident_mb, working

pytestmark = pytest.mark.timeout(60)


def pair(slots: int = 4, **kwargs: Any) -> tuple[SharedSender, SharedReceiver]:
    """Both ends in this process."""
    down, up = socket.socketpair(socket.AF_UNIX)
    return SharedSender(down, slots, **kwargs), SharedReceiver(up, **kwargs)


# What comes out


@settings(max_examples=100, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(0, 5), max_size=6), seed=st.integers(0, 99))
def test_layouts_and_values_are_kept(data: st.DataObject, shape: list[int], seed: int) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    dtype = data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(seed)
    tensor = (100 * torch.randn(shape)).to(dtype).permute(order)
    sender, receiver = pair()
    with closing(sender, receiver):
        sender.send(tensor)
        assert_same(receiver.receive(tensor.shape), tensor)


SPARSE = {
    "slice": lambda: torch.randn(4, 6, 5)[:, ::2],
    "expanded": lambda: torch.randn(3, 1).expand(3, 5),
    "offset": lambda: torch.randn(9, 4)[3:],
    "conjugate": lambda: torch.randn(3, 2, dtype=torch.complex64).conj(),
    "channels_last_slice": lambda: torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last)[:, :3],
    "needs_gradient": lambda: torch.randn(3, 2, requires_grad=True),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_tensors_that_do_not_fill_their_memory_arrive_dense(kind: str) -> None:
    tensor = SPARSE[kind]()
    sender, receiver = pair()
    with closing(sender, receiver):
        sender.send(tensor)
        received = receiver.receive(tensor.shape)
        assert torch.equal(received, tensor) and not received.requires_grad
        assert received.untyped_storage().nbytes() == 4096  # a page: nothing of the rest of the slice


def test_a_received_tensor_is_new_aligned_and_a_leaf() -> None:
    sender, receiver = pair(slots=2)
    tensor = torch.randn(3, 4, 5, 5).to(memory_format=torch.channels_last)
    with closing(sender, receiver):
        for scale in (1.0, 2.0):
            sender.send(scale * tensor)
            received = receiver.receive(tensor.shape)
            assert not received.requires_grad and not received._is_view()
            assert received.data_ptr() % 64 == 0
            received.requires_grad_().square().sum().backward()
            torch.testing.assert_close(received.grad, 2 * scale * tensor)


def echo(folder: Path, shapes: list[Sequence[int]], slots: int) -> tuple[int, int]:
    """Send back whatever comes."""
    receiver = SharedReceiver(connect(folder, "down", listen=False))
    sender = SharedSender(connect(folder, "up", listen=True), slots)
    for shape in shapes:
        sender.send(receiver.receive(shape))
    return descriptors(), len(sender._slots)


@contextmanager
def echoing(folder: Path, shapes: list[Sequence[int]], slots: int = 4) -> Iterator[tuple[Any, Any, Any]]:
    with working(echo, folder, shapes, slots) as worker:
        sender = SharedSender(connect(folder, "down", listen=True), slots, "worker 1")
        receiver = SharedReceiver(connect(folder, "up", listen=False), "worker 1")
        with closing(sender, receiver):
            yield worker, sender, receiver


@pytest.mark.parametrize("slots", [1, 3])
def test_tensors_cross_processes_in_order(tmp_path: Path, slots: int) -> None:
    tensors = []
    for i in range(60):
        dtype = (torch.float32, torch.float64, torch.bfloat16)[i % 3]
        tensor = torch.randn(1 + i % 7, 3, 5, 1 + i % 4).to(dtype)
        tensors.append(tensor.to(memory_format=torch.channels_last) if i % 2 else tensor)
    with echoing(tmp_path, [tensor.shape for tensor in tensors], slots) as (_, sender, receiver):
        for tensor in tensors:
            sender.send(tensor)
            received = receiver.receive(tensor.shape)
            assert_same(received, tensor)


def test_both_may_send_before_either_receives(tmp_path: Path) -> None:
    shapes = [(20_000,)] * 12
    with echoing(tmp_path, shapes, slots=3) as (_, sender, receiver):
        for k in range(0, 12, 3):
            for i in range(k, k + 3):
                sender.send(torch.full((20_000,), float(i)))
            for i in range(k, k + 3):
                assert receiver.receive((20_000,))[-1] == i


def test_memory_and_descriptors_do_not_grow(tmp_path: Path) -> None:
    sizes = torch.randint(1, 200_000, (2000,), generator=torch.Generator().manual_seed(0)).tolist()
    before = descriptors(), resident_mb()
    with echoing(tmp_path, [(size,) for size in sizes], slots=2) as (worker, sender, receiver):
        for i, size in enumerate(sizes):
            sender.send(torch.full((size,), float(i)))
            received = receiver.receive((size,))
            assert received[0] == received[-1] == i
        del received
        assert len(sender._slots) <= 2
        assert descriptors() <= before[0] + 16  # a socket, a map per slot and a pipe
        assert resident_mb() < before[1] + 40
        count, slots = worker.result()
        assert count < 40 and slots <= 2
    assert descriptors() <= before[0] + 5


def test_memory_is_made_once_for_tensors_of_one_size() -> None:
    sender, receiver = pair(slots=2)
    with closing(sender, receiver):
        places = set()
        for _ in range(20):
            sender.send(torch.ones(3000))
            places.add(receiver.receive((3000,)).data_ptr())
        assert len(places) == 2


def test_a_tensor_outlives_the_memory_of_its_slot() -> None:
    sender, receiver = pair(slots=1)
    with closing(sender, receiver):
        sender.send(torch.full((10,), 1.0))
        held = receiver.receive((10,))
        sender_thread = threading.Thread(target=sender.send, args=(torch.full((50_000,), 2.0),))
        sender_thread.start()
        assert receiver.receive((50_000,)).sum() == 100_000
        sender_thread.join()
    assert held.sum() == 10


# When an end waits


def test_a_sender_far_ahead_waits_until_a_tensor_is_done_with() -> None:
    watch = Watch()
    sender, receiver = pair(slots=3, waiting=watch)
    with closing(sender, receiver):
        for i in range(3):
            sender.send(torch.full((1000,), float(i)))
        assert watch.times == 0 and sender.waited_s == 0 and sender.moved_s > 0
        thread = threading.Thread(target=sender.send, args=(torch.full((1000,), 3.0),))
        thread.start()
        assert watch.now.wait(5)
        first = receiver.receive((1000,))
        time.sleep(0.2)
        assert thread.is_alive() and first.sum() == 0  # in use: not overwritten
        assert receiver.receive((1000,)).sum() == 1000
        thread.join(5)
        assert not thread.is_alive()
        assert len(sender._slots) == 3 and watch.times == 1 and sender.waited_s > 0.2
        assert [receiver.receive((1000,))[0].item() for _ in range(2)] == [2, 3]
        assert receiver.waited_s == 0


def test_a_sender_does_not_wait_while_there_are_slots() -> None:
    watch = Watch()
    sender, receiver = pair(slots=MAX_SLOTS, waiting=watch)
    with closing(sender, receiver):
        for _ in range(2):  # with descriptors, and without
            for i in range(MAX_SLOTS):
                sender.send(torch.full((3,), float(i)))
            assert [receiver.receive((3,))[0].item() for _ in range(MAX_SLOTS)] == list(range(MAX_SLOTS))
            receiver._give_back()
        assert watch.times == 0


def test_a_receiver_waits_for_a_tensor() -> None:
    watch = Watch()
    sender, receiver = pair(waiting=watch)
    with closing(sender, receiver):
        thread = threading.Timer(0.2, sender.send, [torch.ones(3)])
        thread.start()
        assert receiver.receive((3,)).sum() == 3
        thread.join()
        assert watch.times == 1 and 0.1 < receiver.waited_s < 5


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_signal_is_handled_while_an_end_waits(elsewhere: bool) -> None:
    def handler(*_: object) -> None:
        raise InterruptedError

    sender, receiver = pair()
    main, idle = threading.main_thread(), threading.Event()
    other = threading.Thread(target=idle.wait)
    other.start()
    previous = signal.signal(signal.SIGUSR1, handler)
    target = other if elsewhere else main
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(target.ident or 0, signal.SIGUSR1))
    try:
        with closing(sender, receiver):
            timer.start()
            start = time.perf_counter()
            with pytest.raises(InterruptedError):
                receiver.receive((3,))
            assert time.perf_counter() - start < 2
            sender.send(torch.ones(3))
            assert receiver.receive((3,)).sum() == 3  # nothing is broken
    finally:
        signal.signal(signal.SIGUSR1, previous)
        idle.set()


# An end that has gone, or is out of step


def idle(folder: Path) -> None:
    """Send three tensors before anybody can send some here, and do no more."""
    sender = SharedSender(connect(folder, "up", listen=True))
    for i in range(3):
        sender.send(torch.full((100,), float(i)))
    receiver = SharedReceiver(connect(folder, "down", listen=False))
    receiver.receive((1,))
    time.sleep(100)


@contextmanager
def killed(folder: Path, after_s: float = 0.3) -> Iterator[tuple[SharedSender, SharedReceiver]]:
    """Two ends of which the other process soon dies."""
    with working(idle, folder) as worker:
        receiver = SharedReceiver(connect(folder, "up", listen=False), "worker 1")
        sender = SharedSender(connect(folder, "down", listen=True), 2, "worker 1")
        sender.send(torch.zeros(1))
        with closing(sender, receiver):
            timer = threading.Timer(after_s, worker.process.kill)
            timer.start()
            yield sender, receiver
            timer.join()


def send_all(sender: SharedSender, count: int) -> None:
    for _ in range(count):
        sender.send(torch.zeros(10))


def test_a_sender_notices_the_death_of_the_other_worker(tmp_path: Path) -> None:
    with killed(tmp_path) as (sender, _):
        start = time.perf_counter()
        with pytest.raises(PeerLost, match="worker 1 has gone"):
            send_all(sender, 3)
        assert sender.waited_s > 0.1 and time.perf_counter() - start < 2


def test_a_sender_with_room_notices_it_too(tmp_path: Path) -> None:
    with killed(tmp_path, after_s=0.0) as (sender, _):
        time.sleep(0.3)
        with pytest.raises(PeerLost, match="worker 1 has gone"):
            sender.send(torch.zeros(10))


def test_a_receiver_gets_what_was_sent_and_then_notices_the_death(tmp_path: Path) -> None:
    with killed(tmp_path) as (_, receiver):
        start = time.perf_counter()
        assert [receiver.receive((100,))[-1].item() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(PeerLost, match="worker 1 has gone"):
            receiver.receive((100,))
        assert receiver.waited_s > 0.1 and time.perf_counter() - start < 2


def test_what_was_sent_can_be_received_after_the_death(tmp_path: Path) -> None:
    with killed(tmp_path, after_s=0.0) as (_, receiver):
        time.sleep(0.5)
        assert [receiver.receive((100,))[-1].item() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(PeerLost):
            receiver.receive((100,))


def test_a_closed_end_is_gone_for_the_other() -> None:
    sender, receiver = pair()
    with closing(receiver):
        sender.close()
        with pytest.raises(PeerLost):
            receiver.receive((3,))
    sender, receiver = pair()
    with closing(sender):
        receiver.close()
        with pytest.raises(PeerLost):
            sender.send(torch.ones(3))
    sender, receiver = pair(slots=1)
    with closing(sender):
        sender.send(torch.ones(3))
        receiver.receive((3,))
        receiver.close()
        with pytest.raises(PeerLost):
            sender.send(torch.ones(3))


def test_another_shape_than_expected_is_an_error_that_names_both() -> None:
    sender, receiver = pair()
    with closing(sender, receiver):
        sender.send(torch.ones(2, 3))
        with pytest.raises(PeerLost, match=r"the other worker sent \[2, 3\] where \[3, 2\] was expected"):
            receiver.receive((3, 2))


# How two processes meet


def test_a_socket_leaves_nothing_behind_however_deep_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with echoing(folder, [(2,)]) as (_, sender, receiver):
        sender.send(torch.ones(2))
        assert receiver.receive((2,)).sum() == 2
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("listen", [False, True])
def test_a_process_does_not_wait_for_ever_for_another(tmp_path: Path, listen: bool) -> None:
    before = descriptors()
    with pytest.raises(PeerLost, match=r"nobody came to .*down within 0.2 s"):
        connect(tmp_path, "down", listen, timeout_s=0.2)
    assert list(tmp_path.iterdir()) == []
    assert descriptors() == before
