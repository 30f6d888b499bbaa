"""Builds optimisers and learning-rate schedules from plain settings, completed by the defaults of their schemas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from sglight.compat.torch import remember_rates
from sglight.config.extension import check_arguments, load_class
from sglight.config.schema import OptimizerConfig, SchedulerConfig
from sglight.config.settings import is_path, settings
from sglight.errors import UserError


def optimizer_settings(config: Mapping[str, Any], key: str = "strategy.optimizer") -> dict[str, Any]:
    """The settings of an optimiser, completed by the defaults of `OptimizerConfig`; a ValueError for other keys."""
    return settings(OptimizerConfig, config, key)


def scheduler_settings(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a schedule, completed by the defaults of `SchedulerConfig`; a ValueError for other keys."""
    return settings(SchedulerConfig, config, "strategy.scheduler")


def make_optimizer(
    config: Mapping[str, Any],
    parameters: Iterable[nn.Parameter],
    key: str = "strategy.optimizer",
    lateness: float = 0.0,
) -> Optimizer:
    """Builds an optimiser: ``adam``, ``adamw``, ``nadam``, ``sgd`` or ``package.module.Class``.

    A class given by its path gets ``lr``, ``weight_decay`` if it takes one, and ``kwargs``. As each stage has its own
    optimiser, one that uses all parameters at once trains a network in stages differently from the whole.

    Args:
        config: keys of `OptimizerConfig`.
        parameters: to be trained.
        key: the config key of the settings, for messages.
        lateness: of the gradients, from 0 to 1 for the latest ones; nadam has another momentum for late gradients, see
            `betas`.

    Raises:
        ValueError: for unknown keys or names, or settings that do not go together.

    >>> type(make_optimizer({"name": "sgd", "lr": 0.1}, [nn.Parameter(torch.zeros(2))])).__name__
    'SGD'
    """
    config, parameters = optimizer_settings(config, key), list(parameters)
    if is_path(config["name"]):
        return _optimizer_from_outside(config, parameters, key)
    on_cuda = any(p.is_cuda for p in parameters)
    # Not the fused kernels of the CPU: they round the last elements of a tensor differently, so that a network in
    # stages would not be trained bit for bit like the whole.
    shared = {"lr": config["lr"], "weight_decay": config["weight_decay"]}
    shared |= {"fused": True} if on_cuda else {"foreach": True}
    match config["name"]:
        case "adam":
            return torch.optim.Adam(parameters, betas=tuple(config["betas"]), **shared)
        case "adamw":
            return torch.optim.AdamW(parameters, betas=tuple(config["betas"]), **shared)
        case "nadam":
            rates = {"lr": config["lr"], "weight_decay": config["weight_decay"]}
            return torch.optim.NAdam(parameters, betas=betas(config, lateness), foreach=True, **rates)
        case _:
            momentum, nesterov = config["momentum"], config["nesterov"]
            if nesterov and not momentum:
                raise ValueError(f"{key}.nesterov=true needs {key}.momentum above 0")
            return torch.optim.SGD(parameters, momentum=momentum, nesterov=nesterov, **shared)


def _optimizer_from_outside(config: Mapping[str, Any], parameters: list[nn.Parameter], key: str) -> Optimizer:
    """An optimiser of a class given by its path.

    Raises:
        UserError: if there is no such class, or it does not take the arguments, or needs a closure.
    """
    kind: Any = load_class(config["name"], f"{key}.name", Optimizer)
    closure = signature(kind.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise UserError(
            f"{key}.name={config['name']} evaluates the loss several times a step, which only "
            "strategy.local_solver=lbfgs of strategy=pvd does; choose another one"
        )
    rates = {"lr": config["lr"]}
    if config["weight_decay"] or "weight_decay" in signature(kind).parameters:
        rates["weight_decay"] = config["weight_decay"]
    check_arguments(kind, {"params": None, **rates, **config["kwargs"]}, f"{key}.kwargs", {"params", *rates})
    return kind(parameters, **{**rates, **config["kwargs"]})


def betas(config: Mapping[str, Any], lateness: float) -> tuple[float, float]:
    """The decay rates of an optimiser's moments.

    For nadam the first one is larger for late gradients, up to ``delay_momentum`` for the latest ones: it is
    beta_1 + (delay_momentum - beta_1) d_i / d_0 (after Ajanthan et al. 2025).

    Args:
        config: keys of `OptimizerConfig`.
        lateness: d_i / d_0, from 0 to 1.

    >>> betas({"name": "nadam", "lr": 0.001}, lateness=1.0)
    (0.99, 0.999)
    """
    config = optimizer_settings(config)
    first, second = config["betas"]
    late = lateness if config["name"] == "nadam" else 0.0
    return first + (config["delay_momentum"] - first) * late, second


@dataclass(frozen=True)
class Length:
    """How long a training is, as far as it is known.

    Attributes:
        epochs, updates: it ends after so many epochs or updates, whichever comes first; None for no limit.
        batches: in an epoch, each with one update; None if it is not known before the epoch is over.
    """

    epochs: int | None
    batches: int | None
    updates: int | None = None


class EpochLR(LambdaLR):
    """A learning rate that depends on updates and epochs: call `step` after each update and `end_epoch` after an epoch.

    Args:
        optimizer: whose learning rate is set.
        factor: (number of updates, `ends`) -> the factor of the base rate.

    Attributes:
        ends: the number of updates at the end of each epoch so far.
    """

    def __init__(self, optimizer: Optimizer, factor: Callable[[int, Sequence[int]], float]) -> None:
        self.ends: list[int] = []
        super().__init__(optimizer, lambda updates: factor(updates, self.ends))

    def end_epoch(self) -> None:
        """Sets the learning rate of the next epoch."""
        self.ends = [*self.ends, self.last_epoch]
        self.last_epoch -= 1  # because `step` counts it again
        self.step()


def make_scheduler(config: Mapping[str, Any], optimizer: Optimizer, length: Length) -> LRScheduler:
    """Builds the learning-rate schedule of an optimiser.

    ``plateau`` is stepped after each validation, a class given by its path (with ``kwargs``) after each update. For the
    others, with r the base rate, w the epochs of warm-up, B the batches in an epoch, after t updates and e = t / B
    epochs the rate is

        warm-up       r (t + 1) / (w B)    while e < w
        cosine        r (low + (1 - low) (1 + cos(pi p)) / 2)    p: the part of the training after warm-up that is over
        step          r gamma^floor(floor(e) / step_epochs)
        exponential   r gamma^floor(e)

    If B is not known, e counts complete epochs and the warm-up is (e + 1) / w; p changes with each update if the
    training ends after a number of updates.

    Args:
        config: keys of `SchedulerConfig`.
        optimizer: whose learning rate is set.
        length: of the training.

    Raises:
        ValueError: for an unknown key or name, and for a cosine in a training without an end.
    """
    config = scheduler_settings(config)
    name, warmup = config["name"], config["warmup_epochs"]
    if is_path(name):
        kind: Any = load_class(name, "strategy.scheduler.name", LRScheduler)
        known = {"optimizer": optimizer, **config["kwargs"]}
        check_arguments(kind, known, "strategy.scheduler.kwargs", {"optimizer"})
        return kind(**known)
    if name == "plateau":
        if warmup:
            raise ValueError(
                f"strategy.scheduler.warmup_epochs={warmup} does not go with name=plateau; set it to 0"
            )
        floor = [config["min_factor"] * group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # as torch's other schedules do
        return ReduceLROnPlateau(
            optimizer, "max", factor=config["gamma"], patience=config["patience"], min_lr=floor
        )
    if name == "cosine" and length.epochs is None and length.updates is None:
        raise ValueError(
            "strategy.scheduler.name=cosine needs to know when the training ends, and this one is endless: set "
            "max_epochs or max_steps of the trainer, or choose another schedule"
        )

    def factor(updates: int, ends: Sequence[int]) -> float:
        if length.batches:
            count, batches, warm = updates, length.batches, warmup * length.batches
        else:
            count, batches, warm = len(ends), 1, [0, *ends][min(math.ceil(warmup), len(ends))]
        epoch = count / batches
        if epoch < warmup:
            return (count + 1) / (warmup * batches)
        match name:
            case "cosine":
                done = max(_part(epoch, warmup, length.epochs), _part(updates, warm, length.updates))
                low = config["min_factor"]
                return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done))
            case "step":
                return config["gamma"] ** (int(epoch) // config["step_epochs"])
            case "exponential":
                return config["gamma"] ** int(epoch)
        return 1.0

    return EpochLR(optimizer, factor)


def _part(now: float, first: int, end: int | None) -> float:
    """Which part of the way from ``first`` to ``end`` is done; 0 if there is no end."""
    return 0.0 if end is None else min((now - first) / max(end - first, 1), 1.0)


def forget_moments(optimizer: Optimizer) -> None:
    """Sets the first moments of an optimiser to zero, or clears its whole state if a value in it is not finite."""
    for state in optimizer.state.values():
        for moment in (state.get("exp_avg"), state.get("momentum_buffer")):
            if moment is not None:
                moment.zero_()
    values = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    if not all(v.isfinite().all() for v in values):
        optimizer.state.clear()


def carry_over(scheduler: LRScheduler, earlier: LRScheduler) -> None:
    """Lets the schedule of a new optimiser, perhaps with another base rate, continue where an earlier one is."""
    of_rates: dict[str, Any] = {
        k: v for k, v in scheduler.state_dict().items() if k in ("base_lrs", "min_lrs")
    }
    scheduler.load_state_dict({**earlier.state_dict(), **of_rates})
    now, before = scheduler.optimizer, earlier.optimizer
    for group, other in zip(now.param_groups, before.param_groups, strict=True):
        group["lr"] = now.defaults["lr"] * other["lr"] / before.defaults["lr"]
    remember_rates(scheduler, now)
