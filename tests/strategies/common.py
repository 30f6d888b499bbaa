"""A short training run for strategy tests: fixed batches, no files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from sglight.networks import StableNet

ADAM = {"name": "adam", "lr": 1e-2}
NETWORK = {"shape": (3,), "classes": 4, "channels": 5, "steps": 6, "horizon": 2.0, "seed": 7}
IMAGES = {**NETWORK, "shape": (1, 6, 6), "kernel": "conv", "channels": 4}

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


def batches(
    count: int, size: int = 12, shape: tuple[int, ...] = (3,), seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches of noise with random labels; ``size`` is no power of two, where scaling would be exact."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, *shape, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(count)
    ]


def fit(
    module: pl.LightningModule, data: Any, epochs: int = 1, ckpt: str | None = None, **options: Any
) -> pl.Trainer:
    """Train ``module`` on the given batches."""
    trainer = pl.Trainer(
        max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False,
        **{"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options},
    )  # fmt: skip
    # Whole batches: a bare list would be taken for a list of loaders.
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=ckpt)
    return trainer


def whole(module: Any) -> dict[str, Tensor]:
    """The parameters of a module's stages, put together again as those of the uncut network."""
    net = StableNet(**vars(module.spec))
    found: dict[str, list[Tensor]] = {}
    for _, stage in module.own_stages():
        for name, parameter in stage.named_parameters():
            found.setdefault(name, []).append(parameter.detach())
    joined = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in found.items()}
    assert {n: p.shape for n, p in net.named_parameters()} == {n: p.shape for n, p in joined.items()}
    return joined


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def exact_step(
    stages: Sequence[nn.Module], optimizers: Sequence[Optimizer], x: Tensor, labels: Tensor, pieces: int = 1
) -> None:
    """One update by plain autograd through all stages, with the mean over a batch that is cut into pieces."""
    for h, y in zip(x.tensor_split(pieces), labels.tensor_split(pieces), strict=True):
        for stage in stages:
            h = stage(h)
        F.cross_entropy(h, y, reduction="sum").backward()
    step_by_mean(stages, optimizers, len(labels))


def step_by_mean(stages: Sequence[nn.Module], optimizers: Sequence[Optimizer], samples: int) -> None:
    """Step with the gradients of a sum over so many samples, made a mean."""
    for stage, optimizer in zip(stages, optimizers, strict=True):
        for p in stage.parameters():
            assert p.grad is not None
            p.grad *= 1 / samples
        optimizer.step()
        optimizer.zero_grad()
