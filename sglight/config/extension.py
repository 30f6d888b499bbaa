"""Classes from outside the package, by their dotted paths."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from inspect import signature
from typing import Any, TypeVar

from sglight.config.explanations import did_you_mean
from sglight.errors import UserError

T = TypeVar("T")


def load_class(path: str, key: str, base: type[T]) -> type[T]:
    """The class ``package.module.Name``, a subclass of ``base``.

    Raises:
        UserError: if there is none; ``key`` is where the config names it.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"{key}={path} cannot be imported ({error}); give package.module.Class, where the package is in the "
            "current directory or in a folder of PYTHONPATH"
        ) from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{key}={path} is no subclass of {base.__module__}.{base.__qualname__}; make it one")
    if unwritten := sorted(getattr(found, "__abstractmethods__", ())):
        raise UserError(
            f"{key}={path} does not define {', '.join(unwritten)}; see {base.__module__}.{base.__name__}"
        )
    return found


def check_arguments(kind: type, given: Mapping[str, Any], group: str, hidden: Collection[str] = ()) -> None:
    """Refuse keys of a config group that its class does not take, and missing ones that it needs.

    Args:
        given: all arguments. hidden: those that are no keys.

    Raises:
        UserError: about the first one.
    """
    takes, needs = set[str](), list[str]()
    for made_by in (vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)):
        _, *parameters = signature(made_by).parameters.values()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not takes:
            needs = [p.name for p in named if p.default is p.empty]
        takes |= {p.name for p in named}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
        # Any other keyword is handed on to the next class.
    else:
        takes |= given.keys()
    for name in needs:
        if name not in given:
            raise UserError(f"{group}.{name} is missing, which {kind.__qualname__} needs; give one")
    for name in given:
        if name not in takes:
            remedy = did_you_mean(name, sorted(takes - set(hidden)))
            raise UserError(f"{group}.{name} is unknown to {kind.__qualname__}; {remedy}")
