"""What a checkpoint contains about its network and data, so that it can be used by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from inspect import Parameter, signature
from typing import Any

# Lightning's key in a checkpoint for `arguments`, with which `load_from_checkpoint` calls the class.
ARGUMENTS = "hyper_parameters"
# Attributes of a data module that are facts about its data: see `sglight.data.module.DataModule`.
FACTS = ("name", "shape", "classes", "class_names", "mean", "std", "pixels")


def of_data(datamodule: Any) -> dict[str, Any]:
    """The `FACTS` that a data module has, for the entry `archive.DATA` of a checkpoint; empty without a data module."""
    return {name: plain(getattr(datamodule, name)) for name in FACTS if hasattr(datamodule, name)}


def arguments(kind: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the class ``kind``, by name."""
    call = signature(kind.__init__)  # type: ignore[misc]
    given = call.bind_partial(None, *args, **kwargs).arguments
    _, *named = call.parameters.values()
    found = dict[str, Any]()
    for parameter in named:
        if parameter.name in given:
            value = given[parameter.name]
            found |= value if parameter.kind is Parameter.VAR_KEYWORD else {parameter.name: value}
    return found


def plain(value: Any) -> Any:
    """A value as plain containers, numbers and texts, which a checkpoint may contain; arrays become lists.

    Raises:
        TypeError: for values of other types.
    """
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, str):
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no plain value")


def plain_or_nothing(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values made `plain`; an empty dictionary if one of them cannot be."""
    try:
        return {name: plain(value) for name, value in values.items()}
    except TypeError:
        return {}
