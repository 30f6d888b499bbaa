"""Reads files safely: none can block the reader, use up its memory, or put control characters into its output."""

from __future__ import annotations

import json
import re
import stat
import unicodedata
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 16 << 20  # larger configs and metrics are not read
MOST_VALUES = 20_000  # in a config
DAMAGES = (OSError, ValueError, RecursionError, MemoryError, OverflowError, yaml.YAMLError)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: if it is not a regular file but a pipe or device, which may never end.
        ValueError: if it is no text, or too long.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is no regular file")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path} is longer than {MOST_BYTES} bytes")
    return data.decode()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; empty if it is damaged, None if there is no file."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        return None
    except DAMAGES:
        return {}
    return value if isinstance(value, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; empty if it is damaged, or has aliases, by which a few lines can become huge."""
    try:
        text = read_text(path)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _LOADER)):
            return {}
        value = yaml.load(text, _LOADER)
    except DAMAGES:
        return {}
    return value if isinstance(value, dict) else {}


def resolved(config: Any, node: Any = None, depth: int = 0) -> Any:
    """A config in which ``${key}`` is replaced by the value of that key; other interpolations stay text."""
    node = config if node is None else node
    if isinstance(node, Mapping):
        return {
            key: resolved(config, value, depth) if value is not None else None for key, value in node.items()
        }
    if isinstance(node, list):
        return [resolved(config, value, depth) if value is not None else None for value in node]
    if isinstance(node, str) and depth < 8 and (found := _REFERENCE.fullmatch(node)):
        value = config
        for part in found[1].split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return node if value is None else resolved(config, value, depth + 1)
    return node


def cleaned(value: Any) -> Any:
    """Replaces control characters in texts, because a terminal would act on them; other values stay."""
    if isinstance(value, str):
        return "".join(
            "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in value
        )
    if isinstance(value, Mapping):
        return {cleaned(key): cleaned(each) for key, each in value.items()}
    return [cleaned(each) for each in value] if isinstance(value, list) else value


def number(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    try:
        return float(value) if isinstance(value, int | float) and isfinite(value) else None
    except OverflowError:
        return None
