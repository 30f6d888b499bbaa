"""Looks up parts of the method by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def chosen(key: str, name: str, options: Mapping[str, T]) -> T:
    """The option of that name.

    Raises:
        ValueError: if there is none; the text names ``strategy.<key>`` and lists the options.
    """
    if name not in options:
        raise ValueError(f"strategy.{key}={name} is unknown; choose one of {', '.join(options)}")
    return options[name]
