"""Names the parts of a checkpoint by stage, so that every placement can read it, and checks that it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglight.errors import UserError
from sglight.strategies.plan import Plan

# Lists in Lightning's checkpoints with one entry for each optimiser.
BY_OPTIMIZER = {"optimizer_states", "lr_schedulers"}
# Entries that a `StagedModule` adds to Lightning's checkpoints.
KEYS = {"sglight", "sglight_training", "progress"}
# Fields of a network that may differ when a checkpoint is loaded: no parameter depends on them.
FREE = ("seed", "reversible", "init", "init_scale")


def by_name(checkpoint: dict[str, Any], names: Sequence[str]) -> None:
    """Replace the lists of a checkpoint by dictionaries with names, because another process may have other stages."""
    for key in BY_OPTIMIZER & checkpoint.keys():
        checkpoint[key] = dict(zip(names, checkpoint[key], strict=True))


def by_number(checkpoint: dict[str, Any], names: Sequence[str]) -> None:
    """Undo `by_name` for the optimisers of this process."""
    for key in BY_OPTIMIZER & checkpoint.keys():
        checkpoint[key] = [checkpoint[key][name] for name in names]


def identity(strategy: str, plan: Plan) -> dict[str, Any]:
    """The config keys, with their values, that a checkpoint must share with the module that loads it."""
    network = {f"model.{name}": plain(v) for name, v in vars(plan.spec).items() if name not in FREE}
    return {
        "strategy": strategy, "strategy.stages": plan.last + 1, "strategy.cuts": list(plan.cuts[1:-1]), **network,
        **plan.source.identity(),
    }  # fmt: skip


def training_identity(plan: Plan) -> dict[str, Any]:
    """Further config keys that a checkpoint must share so that a training can resume from it."""
    return {
        "strategy.optimizer.name": plan.optimizer["name"],
        "strategy.scheduler.name": plan.scheduler["name"],
        **plan.source.training_identity(),
    }


def check(checkpoint: Any, ours: Mapping[str, Any], training: Mapping[str, Any] | None, name: str) -> None:
    """Refuse a checkpoint of another network, strategy or program.

    Args:
        checkpoint: its contents.
        ours: the `identity` of the module.
        training: its `training_identity` if a training resumes, else None.
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
    """A value as it is in a file: tuples become lists."""
    return list(value) if isinstance(value, tuple) else value
