"""What a checkpoint calls its parts: by stage and estimator, so that every placement can read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglight.errors import UserError
from sglight.strategies.plan import Plan

# Lists in Lightning's checkpoints with an entry for each optimiser.
BY_OPTIMIZER = {"optimizer_states", "lr_schedulers"}

# What a module writes into its checkpoints besides Lightning's parts.
KEYS = {"sglight", "sglight_training", "progress"}

# Fields of a network that may change between a checkpoint and its resumption: they shape no parameter and no state.
FREE = ("seed", "reversible", "init", "init_scale")


def by_name(checkpoint: dict[str, Any], names: Sequence[str]) -> None:
    """Name the states of optimisers, which Lightning numbers: who goes on may have other stages in its process."""
    for key in BY_OPTIMIZER & checkpoint.keys():
        checkpoint[key] = dict(zip(names, checkpoint[key], strict=True))


def by_number(checkpoint: dict[str, Any], names: Sequence[str]) -> None:
    """Undo `by_name` for the optimisers here."""
    for key in BY_OPTIMIZER & checkpoint.keys():
        checkpoint[key] = [checkpoint[key][name] for name in names]


def identity(strategy: str, plan: Plan) -> dict[str, Any]:
    """What a checkpoint must agree on with the module that loads it, by the keys that set it."""
    network = {f"model.{name}": plain(v) for name, v in vars(plan.spec).items() if name not in FREE}
    return {
        "strategy": strategy, "strategy.stages": plan.last + 1, "strategy.cuts": list(plan.cuts[1:-1]), **network,
        **plan.source.identity(),
    }  # fmt: skip


def training_identity(plan: Plan) -> dict[str, Any]:
    """What a checkpoint must agree on besides for a training to go on from it: whose states it has."""
    return {
        "strategy.optimizer.name": plan.optimizer["name"],
        "strategy.scheduler.name": plan.scheduler["name"],
        **plan.source.training_identity(),
    }


def check(checkpoint: Any, ours: Mapping[str, Any], training: Mapping[str, Any] | None, name: str) -> None:
    """Refuse a checkpoint of another network, strategy or program.

    Args:
        ours: the module's `identity`. training: its `training_identity`, for a training to go on; None for none.
        name: of the checkpoint, for the message.

    Raises:
        UserError: about the first key that differs.
    """
    if not isinstance(checkpoint, Mapping) or not checkpoint.keys() >= KEYS:
        raise UserError(
            f"{name} is not a checkpoint of this version of sglight; give another, such as the run's best.ckpt"
        )
    pairs = [(checkpoint["sglight"], ours)]
    if training is not None:
        pairs.append((checkpoint["sglight_training"], training))
    for saved, wanted in pairs:
        for key in dict.fromkeys([*wanted, *saved]):
            if saved.get(key) != wanted.get(key):
                raise UserError(
                    f"{name} was trained with {key}={saved.get(key)}, not {wanted.get(key)}; give the same dataset=, "
                    "model= and strategy= as then (they are in the config.yaml of its run)"
                )


def plain(value: Any) -> Any:
    """Tuples as lists, as they come back from a file."""
    return list(value) if isinstance(value, tuple) else value
