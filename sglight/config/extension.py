"""Loads classes from outside the package by their dotted paths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from inspect import signature
from typing import Any, TypeVar

import hydra
from hydra.errors import InstantiationException

from sglight.config.explanations import did_you_mean
from sglight.errors import UserError

T = TypeVar("T")


def load_class(path: str, key: str, base: type[T]) -> type[T]:
    """The class with the dotted path ``package.module.Name``.

    Args:
        path: of the class.
        key: the config key that gives it, for messages.
        base: the class of which it must be a subclass.

    Raises:
        UserError: if it cannot be imported, is no subclass of ``base``, or leaves abstract methods undefined.
    """
    module, _, name = path.rpartition(".")
    try:  # hydra.utils.get_class would log an error as well, and say less
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


def instantiate(node: Mapping[str, Any], key: str, base: Callable[..., T]) -> T:
    """The object described by a config node with ``_target_``, made by `hydra.utils.instantiate`.

    Args:
        node: ``_target_``, and the arguments as keys.
        key: the config key of the node, for messages.
        base: the class of which it must be an instance.

    Raises:
        UserError: if it cannot be made, or is no instance of ``base``.
    """
    try:
        found: Any = hydra.utils.instantiate(dict(node), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()).removesuffix(".")
        raise UserError(
            f"{key}._target_={node['_target_']} cannot be made: {reason}; give package.module.Class with its arguments "
            "as keys, where the package is in the current directory or in a folder of PYTHONPATH"
        ) from error
    if not isinstance(found, base):  # type: ignore[arg-type]  # a class, perhaps abstract
        raise UserError(
            f"{key}._target_={node['_target_']} is no {base.__module__}.{base.__qualname__}; give a class that is"
        )
    return found


def check_arguments(kind: type, given: Mapping[str, Any], group: str, hidden: Collection[str] = ()) -> None:
    """Refuse keys of a config group that are no arguments of its class, and missing arguments that it needs.

    Args:
        kind: the class.
        given: all arguments.
        group: the config group, for messages.
        hidden: arguments that are no keys of the config.

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
        # **kwargs passes other keywords to the next class.
    else:
        takes |= given.keys()
    for name in needs:
        if name not in given:
            raise UserError(f"{group}.{name} is missing, which {kind.__qualname__} needs; give one")
    for name in given:
        if name not in takes:
            remedy = did_you_mean(name, sorted(takes - set(hidden)))
            raise UserError(f"{group}.{name} is unknown to {kind.__qualname__}; {remedy}")
