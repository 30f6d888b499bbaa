"""Short trainings on several workers, to compare with the same in one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from sglight.parallel.launcher import launch
from sglight.parallel.strategy import StageStrategy
from sglight.strategies.delayed import Delayed
from sglight.strategies.dni import DNI
from sglight.strategies.multilevel import Multilevel
from sglight.strategies.pvd import PVD
from sglight.strategies.staged import StagedModule
from tests.strategies.common import ADAM, batches

ESTIMATOR = {"name": "mlp", "hidden": [9], "optimizer": {"name": "adam", "lr": 3e-3}}
BATCHES = 7
Job = dict[str, Any]


@dataclass
class Result:
    """What all workers know at the end: parameters, and by worker the metrics and the number of batches."""

    parameters: dict[str, Tensor] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


class Resumable:
    """Batches of which a resumed training does not see again what it has worked off."""

    def __init__(self, data: list[Any]) -> None:
        self.data, self.first = data, 0
        self.trainer: pl.Trainer | None = None

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        first, self.first = self.first, 0
        yield from self.data[first:]

    def state_dict(self) -> dict[str, int]:
        assert self.trainer is not None
        return {"batch": self.trainer.fit_loop.epoch_loop.batch_progress.current.processed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["batch"] % len(self.data)


class Collect(Callback):
    """Gathers the `result` at the end of a training or test."""

    def __init__(self) -> None:
        self.result = Result()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.collect(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.collect(trainer, pl_module)

    def collect(self, trainer: pl.Trainer, module: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        known = module.placement.peers.gather((module.state_dict(), metrics, trainer.global_step))
        for parameters, *_ in known:
            self.result.parameters |= parameters
        self.result.metrics = [metrics for _, metrics, _ in known]
        self.result.steps = [steps for *_, steps in known]


def module(job: Job) -> StagedModule:
    """The module that ``job`` describes: its kind, or `PVD` if it has processors, `Delayed` if microbatches."""
    if "kind" in job:
        return job["kind"](job["network"], job.get("optimizer", ADAM), **job["options"])
    if "processors" in job["options"]:
        return PVD(job["network"], job.get("optimizer", ADAM), **job["options"])
    if "microbatches" in job["options"]:
        return Delayed(job["network"], job.get("optimizer", ADAM), **job["options"])
    options = {"estimator": ESTIMATOR, "diagnose_every_n_batches": 2, **job.get("options", {})}
    kind = Multilevel if "levels" in options else DNI
    return kind(job["network"], job.get("optimizer", ADAM), **options)


def train(job: Job, workers: int = 1, share_memory: bool = True) -> Result:
    """Train as ``job`` says in this worker, or alone; what it gives is whole at worker 0."""
    collect = Collect()
    shape = job["network"]["shape"]
    parallel: dict[str, Any] = {}
    accelerator = job.get("accelerator", "cpu")
    if workers > 1:
        shared = {name: job[name] for name in ("replicas", "layout", "sync_batchnorm") if name in job}
        parallel = {"strategy": StageStrategy(share_memory=share_memory, workers=workers, **shared)}
        # Workers take turns on one GPU unless each is to have its own.
        parallel["devices"] = workers if accelerator == "cpu" or job.get("each") else 1
    trainer = pl.Trainer(
        max_epochs=job.get("epochs", 2), accelerator=accelerator, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(job.get("callbacks")), log_every_n_steps=2,
        num_sanity_val_steps=0, callbacks=[*job.get("callbacks", []), collect], **parallel,
        **job.get("trainer", {}),
    )  # fmt: skip
    data = batches(job.get("batches", BATCHES), shape=shape)
    data += [batch for size in job.get("last", ()) for batch in batches(1, size, shape, seed=2)]
    training = Resumable(data)
    training.trainer = trainer
    data = batches(3, shape=shape, seed=1)
    if "last" in job:  # fewer samples than replicas
        data += batches(1, 1, shape, seed=3)
    validation = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    if job.get("test"):
        trainer.test(module(job), validation, ckpt_path=job["ckpt"], verbose=False, weights_only=True)
    else:
        trainer.fit(module(job), training, validation, ckpt_path=job.get("ckpt"), weights_only=True)
    return collect.result


def train_all(jobs: list[Job], workers: int = 1, share_memory: bool = True) -> list[Result]:
    """`train` each in turn."""
    torch.set_num_threads(1)
    return [train(job, workers, share_memory) for job in jobs]


def train_on(workers: int, jobs: list[Job], share_memory: bool = True) -> list[Result]:
    """`train_all` on so many workers, started here."""
    if workers == 1:
        return train_all(jobs)
    found: list[Result] = launch(train_all, jobs, workers, share_memory, workers=workers, threads=1)
    return found
