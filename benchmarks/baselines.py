"""PyTorch's own ways to train the networks of `stages.py` with true gradients, in one process and in two.

Plain loops with no Lightning, which favours them: the bare loop, `DistributedDataParallel` with the batch halved, and
GPipe and 1F1B of `torch.distributed.pipelining` on two stages; gloo between processes. All of them follow the same true
gradient, so that their losses agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import ADAM, Case, make_batches
from timing import Length, ProcessTimes
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

from sglight.networks.network import Stage
from sglight.strategies.optim import make_optimizer

# What trains on one batch and returns its mean loss where that is known.
Step = Callable[[Tensor, Tensor], Tensor | None]


def loop(make: Callable[[Case], Step], case: Case, raw_dir: Path, length: Length) -> ProcessTimes:
    """Train with the step that ``make`` makes for a case."""
    step, times, losses = make(case), ProcessTimes(), []
    for done, (x, y) in enumerate(length.batches(make_batches(case, raw_dir)), 1):
        loss = step(x, y)
        if loss is not None:
            losses.append(loss)
        times.batch_done(done, length)
    times.losses = [float(loss) for loss in losses]
    return times


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


def pipeline(case: Case, kind: str, cut: int, microbatches: int) -> Step:
    """One of two stages with ``cut`` steps in the first, by the schedule ``gpipe`` or ``1f1b``."""
    spec, rank = case.spec, dist.get_rank()
    part = Stage(spec, 0, cut) if rank == 0 else Stage(spec, cut)
    stage = PipelineStage(ContiguousBoundary(part), rank, 2, torch.device("cpu"))
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


class ContiguousBoundary(nn.Module):
    """A stage whose states are sent as they lie in memory, channels last: gloo sends contiguous tensors only."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        image = len(self.stage.spec.shape) == 3
        if image and not self.stage.is_first:
            x = x.permute(0, 3, 1, 2)
        output: Tensor = self.stage(x)
        return output.permute(0, 2, 3, 1).contiguous() if image and not self.stage.is_last else output
