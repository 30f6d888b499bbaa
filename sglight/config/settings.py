"""Completes sections that a script gives in part, from the defaults of their schema; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from enum import StrEnum
from typing import Any

from sglight.config.explanations import did_you_mean
from sglight.errors import UserError


def is_path(name: str) -> bool:
    """Whether a name has the form ``package.module.Class``."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name) is not None


def check_name(key: str, name: str, names: Iterable[str]) -> None:
    """Refuse a name that is neither one of ``names`` nor has the form ``package.module.Class``.

    Raises:
        UserError: about ``key``.
    """
    if name not in list(names) and not is_path(name):
        raise UserError(
            f"{key}={name} is not allowed; {did_you_mean(name, names)} (or give package.module.Class, your own)"
        )


def settings(schema: type, given: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """All keys of a section with plain values: those that are given, and the schema's defaults for the others.

    Args:
        schema: a dataclass of `sglight.config.schema`.
        given: some of its keys.
        key: the config key of the section, for messages.

    Raises:
        ValueError: for a key that the schema does not have, or a name that is none of its choices.
    """
    defaults, given = vars(schema()), given or {}
    for name in given:
        if name not in defaults:
            raise ValueError(f"{key}.{name} is unknown; {did_you_mean(name, defaults)}")
    found = {**defaults, **given}
    for each in fields(schema):
        if names := each.metadata.get("names"):
            check_name(f"{key}.{each.name}", found[each.name], names)
    if found.get("kwargs") and not is_path(found["name"]):
        raise ValueError(
            f"{key}.kwargs is for package.module.Class, not {key}.name={found['name']}; leave it out"
        )
    for name, default in defaults.items():
        if isinstance(default, StrEnum):
            if found[name] not in list(type(default)):
                raise ValueError(
                    f"{key}.{name}={found[name]} is unknown; {did_you_mean(found[name], type(default))}"
                )
            found[name] = str(found[name])  # checkpoints contain plain values only
    return found
