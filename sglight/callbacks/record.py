"""Writes into each checkpoint what is needed to resume its run: the config, and a fingerprint of the data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from pytorch_lightning.callbacks import Callback, EarlyStopping
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from typing_extensions import override

from sglight.archive import RECORD
from sglight.callbacks.limits import TimeLimit
from sglight.config.finding import CHOICES
from sglight.config.resumption import flat
from sglight.strategies import contents
from sglight.strategies.optim import make_scheduler
from sglight.strategies.staged import StagedModule
from sglight.strategies.training import training_length

COMPARED = ("shape", "class_names", "mean", "std", "classes")  # facts in which data must agree
SAMPLES = 8  # samples whose bytes are part of the fingerprint


class Record(Callback):
    """Writes config, hash and the fingerprint of the data into the checkpoints of a run.

    If the run is resumed with other learning rates or schedules, those of the present config are used.

    Args:
        plain: the config.
        name: the hash of the run, see `sglight.config.resumption.run_hash`.
        fingerprint: of the data, see `describe_data`.
        before: the record of the checkpoint from which the training resumes; empty if it does not.
    """

    def __init__(
        self, plain: Mapping[str, Any], name: str, fingerprint: str, before: Mapping[str, Any]
    ) -> None:
        self._plain = deepcopy(dict(plain))
        self.record = {
            "config": self._plain,
            "hash": name,
            "sealed": True,
            "data": {"fingerprint": fingerprint},
        }
        if HydraConfig.initialized():
            choices = HydraConfig.get().runtime.choices
            self.record["choices"] = {name: str(choices[name]) for name in CHOICES}
        self._before = before

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("lr/")}
        checkpoint[RECORD] = {**self.record, "metrics": metrics, "ended": has_ended(trainer)}

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._before:
            return
        before, now = flat(self._before["config"]), flat(self._plain)
        changed = {key for key in before.keys() & now.keys() if before[key] != now[key]}
        if any(key.startswith("strategy.") for key in changed):
            assert isinstance(pl_module, StagedModule)
            use_own_rates(pl_module, trainer)


class PatientStopping(EarlyStopping):
    """Lightning's `EarlyStopping`, but a resumed run has the patience of its own config."""

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})


def has_ended(trainer: pl.Trainer) -> bool:
    """Whether a callback has stopped the training at the end of an epoch, other than for its time."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    late = any(isinstance(each, TimeLimit) and each.is_over for each in callbacks)
    return bool(trainer.should_stop and trainer.is_last_batch and not late)


def use_own_rates(module: StagedModule, trainer: pl.Trainer) -> None:
    """Gives optimisers and schedules the settings of the present config, after a checkpoint has overwritten them."""
    length = training_length(trainer)
    for optimizer, scheduler in zip(trainer.strategy.optimizers, module.schedulers(), strict=True):
        own = optimizer.defaults
        for group in optimizer.param_groups:
            group["lr"] *= own["lr"] / group.get("initial_lr", own["lr"])
            group["initial_lr"] = own["lr"]
            group |= {
                key: own[key] for key in ("weight_decay", "momentum", "nesterov", "betas") if key in group
            }
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
            for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
                group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
        elif isinstance(scheduler, ReduceLROnPlateau):
            fresh = make_scheduler(module.plan.scheduler, optimizer, length)
            assert isinstance(fresh, ReduceLROnPlateau)
            scheduler.factor, scheduler.patience = fresh.factor, fresh.patience
            floor = module.plan.scheduler["min_factor"] * own["lr"]
            scheduler.min_lrs = [floor for _ in optimizer.param_groups]


def describe_data(datamodule: Any) -> dict[str, Any]:
    """Facts about the data that a checkpoint needs (`contents.of_data`), and a fingerprint of the training set."""
    facts = contents.of_data(datamodule)
    return {**facts, "fingerprint": _fingerprint(datamodule, {name: facts.get(name) for name in COMPARED})}


def differing_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How the data differ from those of a checkpoint, as text; empty if they are the same."""
    for name, label in (
        ("shape", "samples of shape"),
        ("class_names", "the classes"),
        ("classes", "classes:"),
    ):
        if saved.get(name) != now.get(name):
            return f"{label} {_short(saved.get(name))}, not {_short(now.get(name))}"
    return "" if saved.get("fingerprint") == now["fingerprint"] else "other samples than these"


def _short(value: Any) -> str:
    """A value as text; of a list the first entries only."""
    text = ", ".join(map(str, value[:6])) if isinstance(value, list) else str(value)
    return f"{text}, ..." if isinstance(value, list) and len(value) > 6 else text


def _fingerprint(datamodule: Any, known: Mapping[str, Any]) -> str:
    """A hash of the facts ``known``, the labels and a few samples of the training set."""
    digest = hashlib.blake2b(repr([known, int(datamodule.train_size)]).encode(), digest_size=16)
    if hasattr(datamodule, "contents"):
        part = datamodule.contents().parts["train"]
        digest.update(np.ascontiguousarray(part.y).tobytes())
        chosen = part.rows[np.unique(np.linspace(0, len(part.rows) - 1, SAMPLES).astype(int))]
        for row in chosen:
            digest.update(np.ascontiguousarray(part.x[int(row) : int(row) + 1]).tobytes())
    return digest.hexdigest()
