"""A training by Lightning's Trainer as a user's run is, but for logger, checkpoints and bar, measured by batches."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from cases import Batch, Case, make_batches
from timing import Length, ProcessTimes
from torch import Tensor


class Stopwatch(pl.Callback):
    """Measures each worker, and notes the losses where the last stage is."""

    def __init__(self, batch: int, length: Length) -> None:
        self.batch, self.length = batch, length
        self.times = ProcessTimes()
        self.sums: list[tuple[Tensor, int]] = []

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        listen(module, lambda loss, count: self.sums.append((loss.detach(), count)))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.times.batch_done(batch_idx + 1, self.length)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.times.losses = mean_losses(self.sums, self.batch)


def listen(module: Any, note: Callable[[Tensor, int], Any]) -> None:
    """Have ``note`` called with the summed loss and the size of each batch or microbatch, where the last stage is."""
    if hasattr(module, "runtime"):
        add = module.runtime.means.add

        def add_and_note(loss: Tensor, right: Tensor, normaliser: float, samples: int) -> None:
            note(loss, samples)
            add(loss, right, normaliser, samples)

        module.runtime.means.add = add_and_note
    else:  # a source tree before commit 0072043
        record = module.record

        def record_and_note(loss: Tensor, logits: Tensor, labels: Tensor) -> None:
            note(loss, len(labels))
            record(loss, logits, labels)

        module.record = record_and_note


def mean_losses(sums: list[tuple[Tensor, int]], batch: int) -> list[float]:
    """The mean loss of each batch by the summed losses and the sizes of its microbatches."""
    means: list[float] = []
    total, count = 0.0, 0
    for loss, size in sums:
        total, count = total + float(loss), count + size
        if count == batch:
            means.append(total / batch)
            total, count = 0.0, 0
    return means


@dataclass
class Loader:
    """The batches of one epoch."""

    batches: list[Batch]
    length: Length

    def __len__(self) -> int:
        return self.length.total

    def __iter__(self) -> Iterator[Batch]:
        return self.length.batches(self.batches)


def fit(
    make: Callable[[Case], pl.LightningModule],
    case: Case,
    raw_dir: Path,
    length: Length,
    workers: int,
    folder: Path,
    replicas: int = 1,
) -> None:
    """Train the module of ``make`` in this process, one of ``workers``; its times go to ``folder/RANK.json``."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    stopwatch = Stopwatch(case.batch // replicas, length)
    trainer = pl.Trainer(
        accelerator="cpu", devices=workers, strategy=placement(workers, replicas), max_epochs=1, logger=False,
        log_every_n_steps=10, callbacks=[stopwatch], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(make(case), Loader(make_batches(case, raw_dir), length))
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(asdict(stopwatch.times)))


def placement(workers: int, replicas: int) -> Any:
    """The Trainer's strategy: stages and replicas on workers, or all in this process."""
    if workers == 1:
        return "auto"
    from sglight.parallel.strategy import StageStrategy

    return StageStrategy(replicas=replicas) if replicas > 1 else StageStrategy()
