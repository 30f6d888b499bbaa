"""New processes for a measurement, which form a gloo group if there are several."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 120
# What all of them need is imported once, in the server that they are forked from.
PRELOAD = ["torch", "pytorch_lightning", "contenders"]


def in_processes(size: int, threads: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of a top-level function in ``size`` new processes with ``threads`` threads each.

    Raises:
        RuntimeError: if one of them fails, with its traceback; the others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        connections, processes = [], []
        for rank in range(size):
            receiver, sender = context.Pipe(duplex=False)
            place = (rank, size, threads, f"{folder}/store", sender)
            processes.append(context.Process(target=_work, args=(*place, function, args), daemon=True))
            processes[-1].start()
            sender.close()
            connections.append(receiver)
        try:
            return _collect(connections)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _collect(connections: list[Connection]) -> list[Any]:
    """The results of all processes, in their order."""
    results: dict[Connection, Any] = {}
    while len(results) < len(connections):
        for connection in wait([c for c in connections if c not in results]):
            assert isinstance(connection, Connection)
            try:
                failed, results[connection] = connection.recv()
            except EOFError:
                raise RuntimeError("a process of the benchmark died") from None
            if failed:
                raise RuntimeError(f"a process of the benchmark failed:\n{results[connection]}")
    return [results[connection] for connection in connections]


def _work(
    rank: int,
    size: int,
    threads: int,
    store: str,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """What a process does: call the function and send its result, or the traceback."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(threads)
    try:
        if size > 1:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, size),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=TIMEOUT_S),
            )
        result = function(*args)
        if size > 1:
            dist.barrier()
            dist.destroy_process_group()
        sender.send((False, result))
    except BaseException:
        sender.send((True, traceback.format_exc()))
