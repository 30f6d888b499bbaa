"""PyTorch's own ways to train the networks of `stages.py` with true gradients, in one process and in two.

Plain loops with no Lightning, which favours them: the bare loop, `DistributedDataParallel` with the batch halved, and
GPipe and 1F1B of `torch.distributed.pipelining` on two stages; gloo between processes, which are started anew for each
measurement. All of them follow the same true gradient, so that their losses agree.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import cycle, islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from sglight.networks.network import NetworkSpec, Stage
from sglight.strategies.dni import DNI
from sglight.strategies.optim import make_optimizer

ADAM = {"name": "adam", "lr": 1e-3}
TIMEOUT_S = 120
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A network, the estimator at its cuts, and the size of a batch."""

    batch: int
    network: dict[str, Any]
    estimator: dict[str, Any]

    @property
    def spec(self) -> NetworkSpec:
        """The network's."""
        return NetworkSpec(**self.network)

    def dni(self, stages: int = 2, lag: int = 1, diagnose: int = 0) -> DNI:
        """Its training by synthetic gradients."""
        estimator = {**self.estimator, "optimizer": ADAM}
        return DNI(
            self.network, ADAM, stages=stages, lag=lag, estimator=estimator, diagnose_every_n_batches=diagnose
        )


# No batch normalisation (conf/experiment/mnist_conv.yaml has it): halved and micro-batches would change the network.
_SHARED = {"classes": 10, "dynamics": "hamiltonian", "horizon": 4.0, "seed": 1}
CASES = {
    "conv": Case(
        128,
        {
            **_SHARED, "shape": (1, 28, 28), "kernel": "conv", "channels": 16, "steps": 16, "opening": "conv"
        },
        {"name": "conv", "hidden": [32], "kernel_size": 1, "conditional": True},
    ),
    "dense": Case(
        256,
        {**_SHARED, "shape": (784,), "kernel": "dense", "channels": 256, "steps": 32, "opening": "linear"},
        {"name": "mlp", "hidden": [256], "conditional": True},
    ),
}  # fmt: skip


def has_mnist(raw_dir: Path) -> bool:
    """Whether the original files of MNIST are there."""
    return (raw_dir / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file()


def pool(case: Case, raw_dir: Path, count: int = 32) -> list[Batch]:
    """``count`` batches: of MNIST where it is at hand, else of random numbers."""
    size = case.batch * count
    if has_mnist(raw_dir):
        folder = raw_dir / "MNIST" / "raw"
        pixels = np.fromfile(folder / "train-images-idx3-ubyte", np.uint8, 784 * size, offset=16)
        labels = np.fromfile(folder / "train-labels-idx1-ubyte", np.uint8, size, offset=8)
        x, y = (torch.from_numpy(pixels).float() / 255 - 0.1307) / 0.3081, torch.from_numpy(labels).long()
    else:
        draw = torch.Generator().manual_seed(0)
        x, y = torch.randn(784 * size, generator=draw), torch.randint(10, (size,), generator=draw)
    x = x.view(size, *case.spec.shape)
    return list(zip(x.split(case.batch), y.split(case.batch), strict=True))


@dataclass(frozen=True)
class Length:
    """How many batches a measurement has, in turn: not measured, measured, and not measured again.

    The last ones are there so that no process measures how it waits for the others to finish.
    """

    measured: int
    warm_up: int = 3
    cool_down: int = 2

    @property
    def total(self) -> int:
        """All of them."""
        return self.warm_up + self.measured + self.cool_down

    def batches(self, pool: Iterable[Batch]) -> Iterator[Batch]:
        """As many batches of a pool, over and over."""
        return islice(cycle(pool), self.total)


@dataclass
class Lap:
    """What one process measured; the clock of ``start`` and ``end`` is common to all."""

    start: float = 0.0
    end: float = 0.0
    cpu_s: float = 0.0
    page_faults: int = 0
    losses: list[float] = field(default_factory=list)

    def tick(self, done: int, length: Length) -> None:
        """To be called with the number of batches done."""
        if done == length.warm_up:
            self.page_faults, self.cpu_s, self.start = -page_faults(), -process_time(), perf_counter()
        if done == length.warm_up + length.measured:
            self.end = perf_counter()
            self.cpu_s, self.page_faults = self.cpu_s + process_time(), self.page_faults + page_faults()


def page_faults() -> int:
    """How often this process had to wait for memory that the system gave it anew."""
    return getrusage(RUSAGE_SELF).ru_minflt


# What trains on one batch and returns its mean loss where that is known.
Step = Callable[[Tensor, Tensor], Tensor | None]


def loop(case: Case, raw_dir: Path, length: Length, make: Callable[..., Step], *settings: Any) -> Lap:
    """Train with the step that ``make`` makes of a case and settings."""
    step, lap, losses = make(case, *settings), Lap(), []
    for done, (x, y) in enumerate(length.batches(pool(case, raw_dir)), 1):
        loss = step(x, y)
        if loss is not None:
            losses.append(loss)
        lap.tick(done, length)
    lap.losses = [float(loss) for loss in losses]
    return lap


def descent(net: nn.Module) -> Step:
    """Adam on the mean loss."""
    optimizer = make_optimizer(ADAM, net.parameters())

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def bare(case: Case) -> Step:
    """Backpropagation through the whole network."""
    return descent(Stage(case.spec))


def data_parallel(case: Case) -> Step:
    """The whole network in each process, which sees its share of the batch."""
    step = descent(DistributedDataParallel(Stage(case.spec), gradient_as_bucket_view=True))
    rank, size = dist.get_rank(), dist.get_world_size()
    return lambda x, y: step(x.chunk(size)[rank], y.chunk(size)[rank])


def pipeline(case: Case, kind: str, microbatches: int, cut: int) -> Step:
    """One of two stages, fed with parts of the batch by ``gpipe`` or ``1f1b``."""
    spec, rank = case.spec, dist.get_rank()
    part = Stage(spec, 0, cut) if rank == 0 else Stage(spec, cut)
    stage = PipelineStage(Crossing(part), rank, 2, torch.device("cpu"))
    schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[kind](stage, microbatches, F.cross_entropy)
    optimizer = make_optimizer(ADAM, part.parameters())

    def step(x: Tensor, y: Tensor) -> Tensor | None:
        optimizer.zero_grad()
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=losses, return_outputs=False)
        optimizer.step()
        return torch.stack(losses).detach().mean() if losses else None

    return step


class Crossing(nn.Module):
    """A stage whose states cross the cut as they lie in memory, channels last: gloo sends contiguous tensors only."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        image = len(self.stage.spec.shape) == 3
        if image and not self.stage.is_first:
            x = x.permute(0, 3, 1, 2)
        output: Tensor = self.stage(x)
        return output.permute(0, 2, 3, 1).contiguous() if image and not self.stage.is_last else output


def in_processes(size: int, threads: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """The results of a top-level function in ``size`` new processes, which form a group if there are several.

    Raises:
        RuntimeError: if one of them fails, with its traceback; the others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        ends, processes = [], []
        for rank in range(size):
            here, there = context.Pipe(duplex=False)
            place = (rank, size, threads, f"{folder}/store", there)
            processes.append(context.Process(target=_work, args=(*place, function, args), daemon=True))
            processes[-1].start()
            there.close()
            ends.append(here)
        try:
            return _collect(ends)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _collect(ends: list[Connection]) -> list[Any]:
    """What comes out of the processes, in their order, when all of it is there."""
    results: dict[Connection, Any] = {}
    while len(results) < len(ends):
        for end in wait([end for end in ends if end not in results]):
            assert isinstance(end, Connection)
            try:
                failed, results[end] = end.recv()
            except EOFError:
                raise RuntimeError("a process of the benchmark died") from None
            if failed:
                raise RuntimeError(f"a process of the benchmark failed:\n{results[end]}")
    return [results[end] for end in ends]


def _work(
    rank: int,
    size: int,
    threads: int,
    store: str,
    end: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
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
        end.send((False, result))
    except BaseException:
        end.send((True, traceback.format_exc()))
