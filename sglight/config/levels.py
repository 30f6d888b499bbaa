"""Levels of a multilevel training: how long, how fast and in which mode each of them learns; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from math import inf
from typing import Any

MODES = ("exact", "delayed", "dni", "local")


@dataclass(frozen=True)
class Level:
    """One depth, on the way from coarse to fine.

    Attributes:
        mode: ``exact``: true gradients, from which estimators, if there are any, already learn; ``delayed``: true ones
            that come late; ``dni``: synthetic ones; ``local``: those of heads' losses.
        epochs: how many; None for an equal part of those that no level claims.
        lr, estimator_lr: learning rates; None for those of the optimisers' settings.
        microbatches: into how many pieces a batch is cut; None for the strategy's.
    """

    mode: str
    epochs: int | None = None
    lr: float | None = None
    estimator_lr: float | None = None
    microbatches: int | None = None


def make_levels(count: int, config: Mapping[str, Any] | None = None) -> list[Level]:
    """``count`` levels; each field of ``config`` is one value for all of them or a list with one for each.

    Without a mode the first level is ``exact``, all others ``delayed``: an exact start makes late gradients harmless.

    Raises:
        ValueError: for a list of another length, or a value that is not allowed; the text names the key.
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
    """The epoch with which each level begins, if these come from ``epoch`` on in a training of ``max_epochs``.

    Levels without a number of epochs share what the others leave in equal parts; what does not divide goes to the last.

    Raises:
        ValueError: if the numbers do not add up, or leave a level without an epoch.
    """
    claimed = sum(level.epochs or 0 for level in levels)
    open_levels = [k for k, level in enumerate(levels) if level.epochs is None]
    left = max_epochs - epoch - claimed
    if left < len(open_levels) or (left and not open_levels):
        told = ", ".join("null" if level.epochs is None else str(level.epochs) for level in levels)
        behind = f" behind the {epoch} epochs before" if epoch else ""
        raise ValueError(
            f"trainer.max_epochs={max_epochs} is not the sum of strategy.level.epochs=[{told}]{behind}, at least one "
            f"for each of {len(levels)} levels; set trainer.max_epochs={epoch + claimed + len(open_levels)}"
            f"{' or more' if open_levels else ''}, or other epochs"
        )
    epochs = [level.epochs or left // len(open_levels) for level in levels]
    if open_levels:
        epochs[open_levels[-1]] += left % len(open_levels)
    return list(accumulate([epoch, *epochs[:-1]]))


@dataclass(frozen=True)
class Course:
    """Which levels are trained, and from which epoch on.

    Args:
        level, epoch: the first one, and where it begins. strict: whether the numbers of epochs must add up; otherwise
            the last level takes what is over if no other one does.
    """

    level: int = 0
    epoch: int = 0
    strict: bool = True

    def firsts(self, levels: Sequence[Level], max_epochs: int) -> list[int]:
        """The epochs with which this level and those behind it begin; see `first_epochs`."""
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
