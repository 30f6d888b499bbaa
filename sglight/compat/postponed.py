"""Postpones two packages that are imported with Lightning and by torch's optimisers, but that a run hardly uses.

* torchmetrics: Lightning needs the base classes of metrics. The metrics come with torchvision and SciPy.
* torch._dynamo, the tracer behind `torch.compile`: Lightning asks whether a model is an `OptimizedModule`, and
  optimisers mark what must not be traced. It comes with SymPy and many modules of torch.

Together they take more than half of the time to import Lightning. Until anything else of such a package or a module of
it is asked for, `sys.modules` has a stand-in with what is used; then it is imported in full, into the same object.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_loader
from logging import getLogger
from threading import RLock
from types import ModuleType
from typing import Any

METRICS, TRACER = "torchmetrics", "torch._dynamo"
# What Lightning uses of torchmetrics, and the modules that define it.
USED = {"Metric": "torchmetrics.metric", "MetricCollection": "torchmetrics.collections"}

_lock = RLock()
# Functions that were to be marked as not to be traced.
_unmarked = list[Callable[..., Any]]()


def postpone() -> None:
    """Postpone both packages, as far as they have not been imported; to be called before Lightning is imported."""
    if METRICS not in sys.modules:
        package = _created(METRICS)
        vars(package)["_logger"] = getLogger(METRICS)  # for its modules
        import_module("torchmetrics.utilities")  # its modules import each other; this order works
        _postpone(package, **{name: getattr(import_module(home), name) for name, home in USED.items()})
    if TRACER not in sys.modules:
        import torch

        package = _created(TRACER)
        vars(torch)["_dynamo"] = package
        _postpone(package, OptimizedModule=OptimizedModule, disable=_disable, graph_break=_graph_break)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class Postponed(ModuleType):
    """A package that is not imported in full before one of its attributes is missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by those who look at all modules
            raise AttributeError(name)
        _complete(self)
        return getattr(self, name)


def _created(name: str) -> ModuleType:
    """An empty package in `sys.modules`."""
    spec = find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(name)
    sys.modules[name] = module_from_spec(spec)
    return sys.modules[name]


def _postpone(package: ModuleType, **used: Any) -> None:
    vars(package).update(used)
    package.__class__ = Postponed


def _complete(package: ModuleType) -> None:
    """Import a package in full, unless that has been done."""
    with _lock:
        if type(package) is ModuleType:
            return
        package.__class__ = ModuleType
        if package.__name__ == TRACER:
            while _unmarked:
                vars(_unmarked.pop()).pop(
                    "__dynamo_disable", None
                )  # it is marked anew when it is next called
        spec = package.__spec__
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(package)


class _Finder(MetaPathFinder):
    """Completes a postponed package before one of its modules is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for name in (METRICS, TRACER):
            package = sys.modules.get(name)
            if fullname.startswith(f"{name}.") and isinstance(package, Postponed):
                _complete(package)
                # The package may just have imported the module.
                return spec_from_loader(fullname, _Present()) if fullname in sys.modules else None
        return None


class _Present(Loader):
    """Loads what is in `sys.modules`."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        self._module = sys.modules[spec.name]
        self._spec = self._module.__spec__
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Optimized(type):
    def __instancecheck__(cls, instance: object) -> bool:
        frame: Any = sys.modules.get("torch._dynamo.eval_frame")
        return frame is not None and isinstance(instance, frame.OptimizedModule)


class OptimizedModule(metaclass=_Optimized):
    """Stands for torch's class in `isinstance`: there are no such objects before the tracer is imported."""


def _disable(function: Callable[..., Any], recursive: bool = True, **_: Any) -> Callable[..., Any]:
    """Marks a function as not to be traced; there is nothing to be done while there is no tracer."""
    _unmarked.append(function)
    return function


def _graph_break() -> None:
    """Does nothing, as in torch._dynamo, outside a traced function."""
