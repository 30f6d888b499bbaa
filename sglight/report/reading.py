"""Files that others have written, read such that none of them can hang, swamp or fool the reader."""

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

MOST_BYTES = 16 << 20  # of a config or of metrics
MOST_VALUES = 20_000
DAMAGES = (OSError, ValueError, RecursionError, MemoryError, OverflowError, yaml.YAMLError)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        OSError: if it is none that ends, as a pipe or a device. ValueError: if it is no text, or too long.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is no regular file")
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path} is longer than {MOST_BYTES} bytes")
    return data.decode()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, empty if it is damaged, None if there is no such file."""
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        return None
    except DAMAGES:
        return {}
    return value if isinstance(value, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping, empty if it is damaged or refers to parts of itself, by which a few lines may grow without end."""
    try:
        text = read_text(path)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _LOADER)):
            return {}
        value = yaml.load(text, _LOADER)
    except DAMAGES:
        return {}
    return value if isinstance(value, dict) else {}


def resolved(config: Any, node: Any = None, depth: int = 0) -> Any:
    """A config whose values that name another key have that one's; whatever else Hydra would compute stays a text."""
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
    """Texts without control characters, which a terminal would obey; other values as they are."""
    if isinstance(value, str):
        return "".join(
            "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in value
        )
    if isinstance(value, Mapping):
        return {cleaned(key): cleaned(each) for key, each in value.items()}
    return [cleaned(each) for each in value] if isinstance(value, list) else value


def number(value: Any) -> float | None:
    """A finite number, None for anything else."""
    try:
        return float(value) if isinstance(value, int | float) and isfinite(value) else None
    except OverflowError:
        return None
