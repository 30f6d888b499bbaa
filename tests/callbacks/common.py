"""A small run on planar data for the tests of callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from sglight.data.planar import PlanarData
from sglight.strategies.dni import DNI
from sglight.strategies.multilevel import Multilevel

NETWORK = {"shape": (2,), "classes": 2, "channels": 4, "steps": 4, "horizon": 2.0, "seed": 3}


def data() -> PlanarData:
    """Few points of the ellipse."""
    return PlanarData("ellipse", train_points=120, val_points=60, test_points=20, batch_size=40)


def fit(
    callbacks: list[Callback],
    folder: Path,
    epochs: int = 2,
    ckpt: Path | None = None,
    logger: Any = False,
    diagnose_every_n_batches: int = 50,
    fast_dev_run: bool = False,
    levels: int = 1,
    **network: Any,
) -> pl.Trainer:
    """Train a network of two stages."""
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=callbacks, logger=logger, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1,
        fast_dev_run=fast_dev_run, enable_checkpointing=any("Checkpoint" in type(c).__name__ for c in callbacks),
    )  # fmt: skip
    options: dict[str, Any] = {"diagnose_every_n_batches": diagnose_every_n_batches}
    options |= {"levels": levels} if levels > 1 else {}
    kind = Multilevel if levels > 1 else DNI
    module = kind({**NETWORK, **network}, {"name": "adam", "lr": 1e-2}, **options)
    trainer.fit(module, data(), ckpt_path=str(ckpt) if ckpt else None, weights_only=True)
    return trainer
