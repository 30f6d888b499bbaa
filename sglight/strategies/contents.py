"""What a checkpoint says of itself, so that its network can be made and used with nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from inspect import Parameter, signature
from typing import Any

# The key of `arguments` in a checkpoint, Lightning's: `load_from_checkpoint` calls the class with them.
ARGUMENTS = "hyper_parameters"
# What a data module may tell of its data: its name, a sample's shape, the classes, the training set's statistics, and
# whether samples are bytes, whose statistics are those of numbers in [0, 1].
TOLD = ("name", "shape", "classes", "class_names", "mean", "std", "pixels")


def of_data(datamodule: Any) -> dict[str, Any]:
    """What a data module tells, of `TOLD`, for `archive.DATA` in a checkpoint.

    Nothing without one: samples then come as the network takes them.
    """
    return {name: plain(getattr(datamodule, name)) for name in TOLD if hasattr(datamodule, name)}


def arguments(kind: type, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``kind`` by name, as given."""
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
    """Containers, numbers and texts as a checkpoint may hold them; arrays and tensors as lists.

    Raises:
        TypeError: for anything else.
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
    """`plain` values; nothing if one of them is something else."""
    try:
        return {name: plain(value) for name, value in values.items()}
    except TypeError:
        return {}
