"""Where a run begins: at its first epoch, or at a checkpoint, which is checked here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from sglight.archive import check_whole, damaged
from sglight.callbacks.record import differing_data
from sglight.compat.lightning import epochs_done
from sglight.config.resumption import check_same
from sglight.errors import UserError
from sglight.strategies import naming
from sglight.strategies.staged import StagedModule


@dataclass(frozen=True)
class Origin:
    """Where a run begins.

    Attributes:
        epochs, batches: that were trained before the checkpoint.
        is_over: whether the training is complete and only its results are missing.
        ckpt: the path of the checkpoint.
        metrics: of its last epoch.
    """

    epochs: int = 0
    batches: int = 0
    is_over: bool = False
    ckpt: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        plain: Mapping[str, Any],
        module: StagedModule,
        data: Mapping[str, Any],
        before: Any,
    ) -> Origin:
        """Where the run of a config begins.

        Args:
            plain: the config.
            module: the strategy.
            data: facts about the data, see `sglight.callbacks.record.describe_data`.
            before: the record in the checkpoint.

        Raises:
            UserError: if the checkpoint is damaged, was trained on other data or with another network or strategy, or
                if its training is complete and its results are written.
        """
        ckpt, testing = plain["ckpt"], plain["mode"] == "test"
        if ckpt is None:
            return cls()
        checkpoint = _load(ckpt)
        if before:
            check_same(before["config"], plain, f"ckpt={ckpt}")
            if differs := differing_data(before["data"], data):
                raise UserError(f"ckpt={ckpt} was trained on other data: {differs}; give the same dataset=")
        naming.check(
            checkpoint, module.identity(), None if testing else module.training_identity(), f"ckpt={ckpt}"
        )
        if testing:
            return cls()
        epochs = epochs_done(checkpoint)
        steps = plain["trainer"]["max_steps"]
        is_over = (
            epochs >= plain["trainer"]["max_epochs"]
            or (steps is not None and checkpoint["global_step"] >= steps)
            or _ended(plain, before)
        )
        if is_over and _has_results(Path(ckpt).parent.parent, epochs):
            raise UserError(
                f"ckpt={ckpt} has trained {epochs} epochs already; set trainer.max_epochs above that to go on, or "
                "mode=test to evaluate it"
            )
        return cls(epochs, checkpoint["global_step"], is_over, ckpt, before.get("metrics", {}))


def _has_results(folder: Path, epochs: int) -> bool:
    """Whether a run folder has the results of at least so many epochs."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        return bool(metrics["run/epochs"] >= epochs)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _ended(plain: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether the training was stopped early by settings that the present config still has."""
    if not before.get("ended"):
        return False
    earlier = before["config"]
    return bool(
        earlier["callbacks"]["early_stopping"] == plain["callbacks"]["early_stopping"]
        and all(
            earlier["strategy"].get(key) == plain["strategy"].get(key)
            for key in ("target_accuracy", "min_decrease")
        )
    )


def _load(path: str) -> Any:
    """The contents of a checkpoint.

    Raises:
        UserError: if it is damaged.
    """
    check_whole(Path(path), f"ckpt={path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (LookupError, TypeError, OSError, EOFError, RuntimeError, ValueError, UnpicklingError) as error:
        raise damaged(f"ckpt={path}") from error
