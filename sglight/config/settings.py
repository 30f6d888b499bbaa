"""Sections of a config as scripts write them: what they leave out has the schema's defaults; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from sglight.config.explanations import did_you_mean


def settings(schema: type, given: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """All keys of a section, in plain values.

    Args:
        schema: a dataclass of `sglight.config.schema`. given: some of its keys. key: of the section, for errors.

    Raises:
        ValueError: for a key that the schema does not have, or a name that is none of its choices.
    """
    defaults, given = vars(schema()), given or {}
    for name in given:
        if name not in defaults:
            raise ValueError(f"{key}.{name} is unknown; {did_you_mean(name, defaults)}")
    found = {**defaults, **given}
    for name, default in defaults.items():
        if isinstance(default, StrEnum):
            if found[name] not in list(type(default)):
                raise ValueError(
                    f"{key}.{name}={found[name]} is unknown; {did_you_mean(found[name], type(default))}"
                )
            found[name] = str(found[name])  # checkpoints hold plain values
    return found
