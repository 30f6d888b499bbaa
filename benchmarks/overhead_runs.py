"""What `overhead.py` measures, in the process of a source tree: a whole run, plain Lightning, a bare PyTorch loop."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from machine import set_threads
from pytorch_lightning.callbacks import ModelCheckpoint, RichProgressBar, Timer
from pytorch_lightning.loggers import TensorBoardLogger

from sglight import experiment
from sglight.callbacks.timing import EpochTimer
from sglight.config.composing import CONF, check, to_plain

try:
    from sglight.process import set_up
except ImportError:  # a source tree before commit 858c93b
    from sglight.experiment import set_up


def measure(kind: str, overrides: Sequence[str], threads: int) -> tuple[float, float, float]:
    """Wall and CPU seconds and the final validation loss of a "whole run", "plain Lightning" or a "bare loop"."""
    plain = prepared(tuple(overrides), threads)
    if kind == "bare loop":
        return bare_loop(plain)
    with tempfile.TemporaryDirectory() as folder:
        if kind == "plain Lightning":
            return plain_lightning(plain, Path(folder))
        return whole_run(plain, Path(folder) / "run")


@cache
def prepared(overrides: tuple[str, ...], threads: int) -> dict[str, Any]:
    """The plain config of a command line; seeds and threads are set on the way, once."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="sglight"):
        plain = to_plain(check(compose("config", list(overrides))))
    set_up(plain)
    set_threads(threads)
    return plain


def whole_run(plain: dict[str, Any], folder: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds of `Trainer.fit` from the first batch to the end, and the final validation loss."""
    datamodule = experiment.build_datamodule(plain)
    module = experiment.build_module(plain, datamodule)
    _, callbacks = experiment.build_callbacks(plain["callbacks"], folder)
    timer = EpochTimer()
    trainer = experiment.build_trainer(plain, folder, [*callbacks, timer])
    cpu = process_time()
    trainer.fit(module, datamodule)
    return timer.fit_s, process_time() - cpu, float(trainer.callback_metrics["val/loss"])


class Plain(pl.LightningModule):
    """The module that a user of Lightning would write for this network, with automatic optimisation."""

    def __init__(self, net: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        accuracy = (logits.argmax(1) == batch[1]).float().mean()
        self.log_dict({"val/loss": F.cross_entropy(logits, batch[1]), "val/acc": accuracy})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=self.lr, foreach=True)


def built(plain: dict[str, Any]) -> tuple[Any, torch.nn.Module]:
    """The data module and the whole network."""
    datamodule = experiment.build_datamodule(plain)
    module = experiment.build_module(plain, datamodule)
    module.configure_model()
    return datamodule, module.stage(0)


def plain_lightning(plain: dict[str, Any], folder: Path) -> tuple[float, float, float]:
    """The same by Lightning with its own TensorBoard logger, checkpoints (best and last) and bar."""
    datamodule, net = built(plain)
    timer, config = Timer(), plain["trainer"]
    trainer = pl.Trainer(
        max_epochs=config["max_epochs"], limit_train_batches=config["limit_train_batches"], accelerator="cpu",
        logger=TensorBoardLogger(folder), num_sanity_val_steps=0, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, monitor="val/acc", mode="max", save_last=True), RichProgressBar(), timer],
    )  # fmt: skip
    cpu = process_time()
    trainer.fit(Plain(net, plain["strategy"]["optimizer"]["lr"]), datamodule)
    return timer.time_elapsed("train"), process_time() - cpu, float(trainer.callback_metrics["val/loss"])


def bare_loop(plain: dict[str, Any]) -> tuple[float, float, float]:
    """The same by a loop over lists of batches (their making is not timed)."""
    datamodule, net = built(plain)
    loader, limit = datamodule.train_dataloader(), plain["trainer"]["limit_train_batches"]
    epochs = []
    for epoch in range(plain["trainer"]["max_epochs"]):
        loader.sampler.set_epoch(epoch)
        epochs.append([batch for _, batch in zip(range(limit or len(loader)), loader, strict=False)])
    validation = list(datamodule.val_dataloader())
    optimizer = torch.optim.Adam(net.parameters(), lr=plain["strategy"]["optimizer"]["lr"], foreach=True)
    start, cpu = perf_counter(), process_time()
    for batches in epochs:
        net.train()
        for x, y in batches:
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            losses = [F.cross_entropy(net(x), y, reduction="sum") for x, y in validation]
    wall = perf_counter() - start
    return wall, process_time() - cpu, float(sum(losses)) / datamodule.val_size
