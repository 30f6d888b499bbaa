"""Classes from outside the package, by their dotted paths."""

from __future__ import annotations

from importlib import import_module
from typing import TypeVar

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
