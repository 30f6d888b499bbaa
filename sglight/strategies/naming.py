"""Names the parts of a checkpoint by stage, so that every placement can read it, and checks that it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

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
    for written, wanted in pairs:
        saved = _with_present_keys(written)
        for key in dict.fromkeys([*wanted, *saved]):
            if saved.get(key) != wanted.get(key):
                raise UserError(
                    f"{name} was trained with {key}={saved.get(key)}, not {wanted.get(key)}; give the same dataset=, "
                    "model= and strategy= as then (they are in the config.yaml of its run)"
                )


def _with_present_keys(identity: Mapping[str, Any]) -> Mapping[str, Any]:
    """An `identity` that an earlier version may have written, which had ``residual`` for ``form``, or neither."""
    if "strategy.estimator.name" not in identity:
        return identity
    form = "residual" if identity.get("strategy.estimator.residual") else "direct"
    rest = {key: value for key, value in identity.items() if key != "strategy.estimator.residual"}
    return {"strategy.estimator.form": form, **rest}


def check_shapes(saved: Mapping[str, Tensor], ours: Mapping[str, Tensor], name: str) -> None:
    """Refuse parameters of other shapes, as heads had them that saw only the first field of a state.

    Args:
        saved: the state dict of the checkpoint.
        ours: that of the module.
        name: of the checkpoint, for the message.

    Raises:
        UserError: about the first one that differs.
    """
    for key in ours:
        if key in saved and saved[key].shape != ours[key].shape:
            shapes = " instead of ".join(str(list(each[key].shape)) for each in (saved, ours))
            raise UserError(
                f"{name} has {key} with the shape {shapes}: it is of an earlier version of sglight, whose heads saw "
                "less of a state; begin a run of its own without ckpt (mode=predict and mode=export can still use it)"
            )


def plain(value: Any) -> Any:
    """A value as it is in a file: tuples become lists."""
    return list(value) if isinstance(value, tuple) else value
