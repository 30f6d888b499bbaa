"""Measures what a batch costs a worker, by training a few batches of noise."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from sglight.link import Replicas
from sglight.parallel import launcher
from sglight.strategies.recorder import COMPUTING
from sglight.strategies.simulation import StageTimes
from sglight.strategies.staged import StagedModule

BATCHES = 7  # the first two are not counted


def rehearse(
    module: StagedModule, samples: int, replicas: int, at_once: int, threads: int
) -> list[StageTimes]:
    """The seconds of the phases of each stage for a batch, if one worker has all stages.

    What no phase contains, as the copies of weights and Lightning's own work, is spread over all phases.

    Args:
        module: like the one to train; it is not changed.
        samples: in a batch.
        replicas: the worker trains on its part of the batch, one of so many.
        at_once: the number of processes that measure at the same time, because they share the cores.
        threads: of each process, if there are several.
    """
    task = (type(module), module.arguments, samples, replicas)
    if at_once == 1:
        return _rehearse(*task)
    found: list[StageTimes] = launcher.launch(_rehearse, *task, workers=at_once, threads=threads)
    return found


def _rehearse(
    kind: type[StagedModule], arguments: dict[str, Any], samples: int, replicas: int
) -> list[StageTimes]:
    module, clock = kind(**arguments), _Clock()
    module.place(replace(module.placement, replicas=_Imagined(replicas)))
    spec = module.plan.spec
    torch.manual_seed(0)
    batches: Any = [(torch.randn(samples, *spec.shape), torch.randint(spec.classes, (samples,)))] * BATCHES
    with _quiet():
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, callbacks=[clock], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(batches, batch_size=None))
    return clock.stage_times(module)


class _Clock(pl.Callback):
    """The times at which batches end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    @override
    def on_train_batch_end(self, *args: Any) -> None:
        self.ends.append(perf_counter())

    def stage_times(self, module: StagedModule) -> list[StageTimes]:
        """The typical seconds of the phases of each stage, which together are the typical time from end to end."""
        phases: dict[tuple[int, str], dict[int, float]] = defaultdict(lambda: defaultdict(float))
        for span in module.runtime.recorder.spans:
            if span.phase in COMPUTING and span.batch >= 2:
                phases[span.stage, span.phase][span.batch] += span.end - span.start
        typical = {key: median(seconds.values()) for key, seconds in phases.items()}
        whole = median(b - a for a, b in zip(self.ends[1:], self.ends[2:], strict=False))
        scale = whole / sum(typical.values())
        return [
            StageTimes(**{name: scale * seconds for (stage, name), seconds in typical.items() if stage == i})
            for i in range(module.plan.last + 1)
        ]


class _Imagined(Replicas):
    """The first of several replicas, the others of which do not exist: sums take no time, and are not sums."""

    def __init__(self, size: int) -> None:
        self.size = size


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says about a training."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
