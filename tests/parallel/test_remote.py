"""Workers in gloo groups of their own: what they tell each other, where they listen, how they part."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglight.errors import PeerLost
from sglight.parallel import remote
from sglight.parallel.remote import (
    GroupPeers,
    NcclReceiver,
    NcclSender,
    gloo,
    meeting_name,
    rendezvous_env,
    rendezvous_file,
)
from tests.parallel.workers import together, working

pytestmark = pytest.mark.timeout(60)


def peers_at(folder: Path, rank: int, size: int, name: str = "peers") -> GroupPeers:
    return GroupPeers(rendezvous_file(folder, rank, size), rank, size, name)


def in_peers(rank: int, size: int, folder: Path, action: Callable[[GroupPeers], Any]) -> Any:
    """What an action returns to each of so many workers."""
    peers = peers_at(folder, rank, size)
    try:
        return action(peers)
    finally:
        peers.close()
        assert not dist.is_initialized()


# What workers tell each other


def several_totals(peers: GroupPeers) -> list[Any]:
    pending = [peers.total([float(i), 10.0**-i, peers.rank]) for i in range(20)]
    totals = [one.result() for one in pending]
    return [totals, all(one.ready() for one in pending), peers.total([]).result()]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_totals_are_the_same_sums_everywhere_in_double_precision(tmp_path: Path, size: int) -> None:
    results = together(in_peers, size, tmp_path, several_totals)
    assert all(result == results[0] for result in results)
    totals, ready, nothing = results[0]
    for i, total in enumerate(totals):
        assert total == pytest.approx([size * i, size * 10.0**-i, sum(range(size))], rel=1e-15)
    assert ready and nothing == []


def total_with_a_late_worker(peers: GroupPeers) -> tuple[bool, float, list[float]]:
    time.sleep(0.5 * peers.rank)
    start = time.perf_counter()
    pending = peers.total([1.0])
    ready, seconds = pending.ready(), time.perf_counter() - start
    result = pending.result()
    assert peers.rank == 1 or peers.waited_s > 0.2
    return ready, seconds, result


def test_a_total_does_not_wait_until_it_is_asked(tmp_path: Path) -> None:
    ready, seconds, result = together(in_peers, 2, tmp_path, total_with_a_late_worker)[0]
    assert not ready and seconds < 0.2 and result == [2.0]


def round_of_messages(peers: GroupPeers) -> list[Any]:
    states = torch.arange(6.0).view(2, 3).t() + peers.rank
    value = {"rank": peers.rank, "states": states, "text": "x" * peers.rank}
    gathered = peers.gather(value)
    shared = peers.share(value)
    told = [peers.broadcast(value if peers.rank == i else None, i) for i in range(peers.size)]
    peers.barrier()
    return [gathered, shared, told]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_values_of_any_kind_are_gathered_shared_and_broadcast(tmp_path: Path, size: int) -> None:
    results = together(in_peers, size, tmp_path, round_of_messages)
    assert [len(gathered) for gathered, *_ in results] == [size] + [0] * (size - 1)
    for values in (results[0][0], *(values for _, *both in results for values in both)):
        for rank, value in enumerate(values):
            assert (value["rank"], value["text"]) == (rank, "x" * rank)
            assert torch.equal(value["states"], torch.arange(6.0).view(2, 3).t() + rank)


def large_message(peers: GroupPeers) -> tuple[int, float]:
    weights = peers.broadcast(torch.full((12_000_000,), 3.0) if peers.rank == 0 else None)
    return len(peers.gather(weights)), weights.sum().item()


def test_large_values_pass_as_well(tmp_path: Path) -> None:
    assert together(in_peers, 2, tmp_path, large_message) == [(2, 36e6), (0, 36e6)]


def arrive_late(peers: GroupPeers) -> tuple[float, float]:
    time.sleep(0.4 * peers.rank)
    before = time.time()
    peers.barrier()
    return before, time.time()


def test_nobody_passes_a_barrier_before_all_are_there(tmp_path: Path) -> None:
    results = together(in_peers, 3, tmp_path, arrive_late)
    assert min(after for _, after in results) >= max(before for before, _ in results)


def meet_twice(rank: int, size: int, folder: Path) -> list[Any]:
    store = rendezvous_file(folder, rank, size)
    results = []
    for name in ("run0", "run1"):
        time.sleep(0.3 * rank)  # nobody may take what the last run left for what this one says
        peers = GroupPeers(store, rank, size, name)
        results.append(peers.broadcast(name if rank == 0 else None))
        peers.close()
    return results


def test_one_store_serves_one_run_after_the_other(tmp_path: Path) -> None:
    assert together(meet_twice, 2, tmp_path) == [["run0", "run1"]] * 2


def meet_by_environment(rank: int, size: int, port: int) -> list[float]:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    sums = []
    for name in ("run0", "run1"):
        store, found_rank, found_size = rendezvous_env()
        assert (found_rank, found_size) == (rank, size)
        peers = GroupPeers(store, rank, size, name, local=False)
        sums += peers.total([1.0]).result()
        peers.close()
    assert not dist.is_initialized()
    return sums


def test_workers_meet_by_the_variables_of_torchrun(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert together(meet_by_environment, 2, port) == [[2.0, 2.0]] * 2


def test_workers_that_are_started_again_do_not_meet_those_before_them() -> None:
    store, names = dist.HashStore(), list[str]()
    store.set("greeting/1", "gone")  # of one that has died before it was answered
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda rank: meeting_name(store, rank, 3), range(3)))
        assert len(set(found)) == 1
        names += found
    assert len(set(names)) == 2


# Where they listen


def own_addresses(peers: GroupPeers) -> set[str]:
    """The local addresses of this process's TCP sockets, as the kernel prints them."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    lines = [
        line.split()
        for kind in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{kind}").read_text().splitlines()
    ]
    return {line[1].split(":")[0] for line in lines if f"socket:[{line[9]}]" in links}


def join_where_another_interface_is_asked_for(rank: int, size: int, folder: Path) -> set[str]:
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    os.environ["GLOO_SOCKET_IFNAME"] = others[-1] if others else "lo"
    return in_peers(rank, size, folder, own_addresses)


def test_workers_of_one_machine_are_reachable_from_there_alone(tmp_path: Path) -> None:
    assert together(join_where_another_interface_is_asked_for, 2, tmp_path) == [{"0100007F"}] * 2


# How they part


def wait_for_total(peers: GroupPeers) -> None:
    peers.total([1.0]).result()


def wait_for_barrier(peers: GroupPeers) -> None:
    peers.barrier()


def wait_for_value(peers: GroupPeers) -> None:
    peers.broadcast(None, 1)


def wait_for_values(peers: GroupPeers) -> None:
    peers.gather(torch.zeros(3))


def join_and_sleep(folder: Path) -> None:
    peers = peers_at(folder, 1, 2)
    time.sleep(100)
    peers.close()


@pytest.mark.parametrize("wait", [wait_for_total, wait_for_barrier, wait_for_value, wait_for_values])
def test_the_death_of_a_worker_is_noticed(tmp_path: Path, wait: Callable[[GroupPeers], None]) -> None:
    with working(join_and_sleep, tmp_path) as worker:
        peers = peers_at(tmp_path, 0, 2)
        threading.Timer(0.3, worker.process.kill).start()
        start = time.perf_counter()
        with pytest.raises(PeerLost, match="a worker has gone"):
            wait(peers)
        assert 0.1 < time.perf_counter() - start < 2
        with pytest.raises(PeerLost):
            wait(peers)
        peers.close()


def test_one_may_leave_while_a_total_is_under_way(tmp_path: Path) -> None:
    with working(join_and_sleep, tmp_path):
        peers = peers_at(tmp_path, 0, 2)
        pending = peers.total([1.0])
        start = time.perf_counter()
        peers.close()
        assert time.perf_counter() - start < 1
        with pytest.raises(PeerLost):
            pending.result()
        peers.close()


def test_a_signal_is_handled_while_a_worker_waits(tmp_path: Path) -> None:
    def handler(*_: object) -> None:
        raise InterruptedError

    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with working(join_and_sleep, tmp_path):
            peers = peers_at(tmp_path, 0, 2)
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            start = time.perf_counter()
            with pytest.raises(InterruptedError):
                peers.barrier()
            assert time.perf_counter() - start < 2
            peers.close()
    finally:
        signal.signal(signal.SIGUSR1, previous)


def test_workers_that_do_not_come_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MEET_S", 0.2)
    with pytest.raises(PeerLost, match=r"only 1 of 3 workers came within 0.2 s"):
        peers_at(tmp_path, 0, 3)


# From GPU to GPU


def exchange(rank: int, size: int, group: Any, device: torch.device) -> None:
    """Images and vectors down, as many as the sender may have on their way and more."""
    shapes = [(2, 3, 4, 5), (7, 3)] * 4
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    if rank == 0:
        sender = NcclSender(group, torch.channels_last, slots=3)
        for tensor in tensors:
            sender.send(tensor.requires_grad_())
        assert len(sender._under_way) == 3
        for work, _ in sender._under_way:
            work.wait()
        return
    receiver = NcclReceiver(group, device, memory_format=torch.channels_last)
    for tensor in tensors:
        received = receiver.receive(tensor.shape)
        assert torch.equal(received, tensor)
        assert received.dim() != 4 or received.is_contiguous(memory_format=torch.channels_last)


def exchange_by_gloo(rank: int, size: int, folder: Path) -> None:
    exchange(
        rank, size, gloo(rendezvous_file(folder, rank, size), rank, size, "down", True), torch.device("cpu")
    )


def exchange_by_nccl(rank: int, size: int, folder: Path) -> None:
    group = remote.nccl(rendezvous_file(folder, rank, size), rank, "down")
    exchange(rank, size, group, torch.device("cuda", rank))
    torch.cuda.synchronize()


def test_what_gpus_exchange_keeps_its_layout_tried_with_gloo(tmp_path: Path) -> None:
    together(exchange_by_gloo, 2, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_what_gpus_exchange_keeps_its_layout(tmp_path: Path) -> None:
    together(exchange_by_nccl, 2, tmp_path)
