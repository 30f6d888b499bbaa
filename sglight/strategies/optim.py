"""Optimisers and learning-rate schedules from plain config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau


def make_optimizer(config: Mapping[str, Any], parameters: Iterable[nn.Parameter]) -> Optimizer:
    """``adam``, ``adamw`` or ``sgd`` with the config's ``lr, weight_decay, momentum, betas``.

    The kernels are the multi-tensor ones on the CPU as well: fused CPU kernels round the last elements of a tensor
    differently, so that a network cut into stages would not learn bit for bit as the whole does.
    """
    parameters = list(parameters)
    on_cuda = any(p.is_cuda for p in parameters)
    shared = {"lr": config["lr"], "weight_decay": config.get("weight_decay", 0.0)}
    shared |= {"fused": True} if on_cuda else {"foreach": True}
    betas = tuple(config.get("betas", (0.9, 0.999)))
    match config["name"]:
        case "adam":
            return torch.optim.Adam(parameters, betas=betas, **shared)
        case "adamw":
            return torch.optim.AdamW(parameters, betas=betas, **shared)
        case "sgd":
            return torch.optim.SGD(parameters, momentum=config.get("momentum", 0.0), **shared)
        case name:
            raise ValueError(f"optimizer.name={name} is unknown; choose adam, adamw or sgd")


def make_scheduler(
    config: Mapping[str, Any], optimizer: Optimizer, epochs: int, batches: int
) -> LambdaLR | ReduceLROnPlateau:
    """A schedule that is stepped once a batch (``plateau``: once a validation).

    Args:
        config: ``name`` (none, cosine, step, exponential or plateau) and its settings, in epochs.
        epochs, batches: length of the training, and of an epoch.
    """
    name, warmup = config["name"], config.get("warmup_epochs", 0)
    if name == "plateau":
        floor = [config["min_factor"] * group["lr"] for group in optimizer.param_groups]
        return ReduceLROnPlateau(
            optimizer, "max", factor=config["gamma"], patience=config["patience"], min_lr=floor
        )
    if name not in ("none", "cosine", "step", "exponential"):
        raise ValueError(
            f"scheduler.name={name} is unknown; choose none, cosine, step, exponential or plateau"
        )

    def factor(step: int) -> float:
        epoch = step / batches
        if epoch < warmup:
            return (step + 1) / (warmup * batches)
        match name:
            case "cosine":
                done = min((epoch - warmup) / max(epochs - warmup, 1), 1.0)
                low = float(config["min_factor"])
                return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
            case "step":
                return float(config["gamma"]) ** (int(epoch) // config["step_epochs"])
            case "exponential":
                return float(config["gamma"]) ** int(epoch)
        return 1.0

    return LambdaLR(optimizer, factor)


def forget_moments(optimizer: Optimizer) -> None:
    """Forget which way an optimiser was going, and, if that is not finite, how large gradients were."""
    for state in optimizer.state.values():
        for moment in (state.get("exp_avg"), state.get("momentum_buffer")):
            if moment is not None:
                moment.zero_()
    values = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    if not all(v.isfinite().all() for v in values):
        optimizer.state.clear()


def go_on(scheduler: LambdaLR | ReduceLROnPlateau, earlier: LambdaLR | ReduceLROnPlateau) -> None:
    """Put a new schedule, of another optimiser and perhaps another rate, where an earlier one of its kind is."""
    of_rates: dict[str, Any] = {
        k: v for k, v in scheduler.state_dict().items() if k in ("base_lrs", "min_lrs")
    }
    scheduler.load_state_dict({**earlier.state_dict(), **of_rates})
    now, before = scheduler.optimizer, earlier.optimizer
    for group, other in zip(now.param_groups, before.param_groups, strict=True):
        group["lr"] = now.defaults["lr"] * other["lr"] / before.defaults["lr"]
    scheduler._last_lr = [group["lr"] for group in now.param_groups]
