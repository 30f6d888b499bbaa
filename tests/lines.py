"""A generator of overrides made from the schema: right ones, wrong ones, and what nobody would write."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from types import NoneType
from typing import Any, get_args, get_type_hints

from omegaconf import DictConfig, OmegaConf

from sglight.config.ranges import RANGES

NONSENSE = (
    "nan", "inf", "-inf", "-1", "0", "1e300", "1e-300", "4294967296", "1000000000", "100000", "-0.0", "0.5", "1.5",
    "999999999999999999999999", "true", "null", "abc", "''", "[]", "[1,nan]", "[inf]", "[1,2,3]", "{a: 1}", "ü",
    "'a,b'", "[[1]]", "1_000", "0x10",
)  # fmt: skip
# What changes which files are looked for, or which class is imported, is another test's; a logger checks its own keys.
LEFT_OUT = (
    "_target_",
    "data_dir",
    "raw_dir",
    "archive",
    "path",
    "ckpt",
    "mode",
    "skip_completed",
    "kwargs",
    "logger",
)


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys of a composed config, and their types in the schema."""
    hints = get_type_hints(OmegaConf.get_type(node)) if is_dataclass(OmegaConf.get_type(node)) else {}
    for name in map(str, node):
        child = node._get_node(name)
        if name in LEFT_OUT:
            continue
        if isinstance(child, DictConfig) and not child._is_none():
            yield from leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hints.get(name, Any)


def lines(node: DictConfig, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """So many pairs of a key and the text of a value."""
    generator, keys = random.Random(seed), sorted(leaves(node), key=lambda pair: pair[0])
    for k in range(count):
        key, hint = keys[k % len(keys)]
        yield key, generator.choice([*NONSENSE, *_likely(key, hint)])


def _likely(key: str, hint: Any) -> list[str]:
    parts = [part for part in (get_args(hint) or (hint,)) if part is not NoneType]
    enum = next((part for part in parts if isinstance(part, type) and issubclass(part, Enum)), None)
    if enum is not None:
        return [member.name for member in enum] * 3
    if (allowed := RANGES.get(key)) is not None:
        ends = [allowed.least, allowed.most, (allowed.least + min(allowed.most, 8)) / 2]
        near = [*ends, ends[0] - 1, ends[1] + 1, math.nextafter(ends[1], math.inf)]
        return [str(int(v)) if allowed.whole and v == int(v) else repr(v) for v in near]
    return ["true", "false"]


def numeric_keys(node: type, prefix: str = "") -> Iterator[str]:
    """The keys of a schema that hold numbers, or lists of them."""
    hints = get_type_hints(node)
    for field in fields(node):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from numeric_keys(hint, f"{key}.")
        elif {int, float} & {hint, *get_args(hint), *(b for a in get_args(hint) for b in get_args(a))}:
            yield key
