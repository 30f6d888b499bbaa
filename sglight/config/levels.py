"""The levels of a multilevel training, from coarse to fine: mode, epochs and rates of each. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import inf
from typing import Any

MODES = ("exact", "delayed", "dni", "local")


@dataclass(frozen=True)
class Level:
    """The settings of one level, that is of the training at one depth.

    Attributes:
        mode: where gradients come from. ``exact``: backpropagation, from which estimators (if there are any) learn
            already; ``delayed``: true gradients that arrive late; ``dni``: synthetic gradients; ``local``: the losses
            of local heads.
        epochs: how many; None for an equal share of the epochs that no level claims.
        lr, estimator_lr: learning rates; None for those of ``strategy.optimizer`` and ``strategy.estimator.optimizer``.
        microbatches: into how many pieces a batch is split; None for ``strategy.microbatches``.
    """

    mode: str
    epochs: int | None = None
    lr: float | None = None
    estimator_lr: float | None = None
    microbatches: int | None = None


def make_levels(count: int, config: Mapping[str, Any] | None = None) -> list[Level]:
    """The levels that ``strategy.level`` describes.

    Args:
        count: how many.
        config: fields of `Level`, each one value for all levels or a list with one for each. Without a mode the first
            level is ``exact`` and all others are ``delayed``, because late gradients do less harm after an exact start.

    Raises:
        ValueError: for a list of another length, or a value that is not allowed; the text names the key.

    >>> [(level.mode, level.epochs) for level in make_levels(2, {"epochs": [3, 5]})]
    [('exact', 3), ('delayed', 5)]
    """
    if count < 1:
        raise ValueError(f"strategy.levels={count} must be at least 1 (the finest depth alone)")
    known = [field.name for field in fields(Level)]
    for name in config or {}:
        if name not in known:
            raise ValueError(f"strategy.level.{name} is unknown; choose among {', '.join(known)}")
    columns = {name: _spread(name, value, count) for name, value in (config or {}).items()}
    modes = columns.pop("mode", [None] * count)
    default = ["exact", *["delayed"] * (count - 1)]
    for mode in modes:
        if mode not in (*MODES, None):
            raise ValueError(f"strategy.level.mode={mode} is unknown; choose one of {', '.join(MODES)}")
    for name, values in columns.items():
        whole = name in ("epochs", "microbatches")
        for value in values:
            kinds = int if whole else (int, float)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < inf
            ):
                raise ValueError(
                    f"strategy.level.{name}={value} is not allowed; it must be a positive "
                    f"{'whole number' if whole else 'number'} or null"
                )
    modes = [mode or usual for mode, usual in zip(modes, default, strict=True)]
    if {"dni", "local"} <= set(modes):
        raise ValueError(
            f"strategy.level.mode={modes} needs estimators of two kinds; choose dni or local, not both"
        )
    return [Level(modes[k], **{name: values[k] for name, values in columns.items()}) for k in range(count)]


def first_epochs(levels: Sequence[Level], max_epochs: int, epoch: int = 0) -> list[int]:
    """The first epoch of each level, if they begin with ``epoch`` in a training of ``max_epochs``.

    Levels without a number of epochs share in equal parts what the others leave; a remainder goes to the last of them.

    Raises:
        ValueError: if the numbers do not add up to ``max_epochs``, or leave a level without an epoch.

    >>> first_epochs(make_levels(3, {"epochs": [2, None, None]}), max_epochs=10)
    [0, 2, 6]
    """
    claimed = sum(level.epochs or 0 for level in levels)
    open_levels = [k for k, level in enumerate(levels) if level.epochs is None]
    left = max_epochs - epoch - claimed
    if left < len(open_levels) or (left and not open_levels):
        given = ", ".join("null" if level.epochs is None else str(level.epochs) for level in levels)
        done = f" after the {epoch} epochs before" if epoch else ""
        raise ValueError(
            f"trainer.max_epochs={max_epochs} is not the sum of strategy.level.epochs=[{given}]{done}, at least one "
            f"for each of {len(levels)} levels; set trainer.max_epochs={epoch + claimed + len(open_levels)}"
            f"{' or more' if open_levels else ''}, or other epochs"
        )
    epochs = [level.epochs or left // len(open_levels) for level in levels]
    if open_levels:
        epochs[open_levels[-1]] += left % len(open_levels)
    return list(accumulate([epoch, *epochs[:-1]]))


@dataclass(frozen=True)
class Course:
    """Which levels are still to be trained, and from which epoch on.

    Args:
        level: the first of them.
        epoch: its first epoch.
        strict: whether the numbers of epochs must add up; if not, the last level may be longer or shorter.
    """

    level: int = 0
    epoch: int = 0
    strict: bool = True

    def firsts(self, levels: Sequence[Level], max_epochs: int) -> list[int]:
        """The first epochs of this level and those after it, see `first_epochs`."""
        left = list(levels[self.level :])
        if not self.strict and all(level.epochs is not None for level in left):
            left[-1] = replace(left[-1], epochs=None)
        return first_epochs(left, max_epochs, self.epoch)


def _spread(name: str, value: Any, count: int) -> list[Any]:
    """One value for each level."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"strategy.level.{name}={list(value)} has {len(value)} entries, but strategy.levels={count}; give one "
            "for each level, or one value for all"
        )
    return list(value)
