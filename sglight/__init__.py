"""Deep stable networks, and strategies that train their parts at the same time.

>>> import sglight
>>> net = sglight.StableNet(shape=(2,), classes=3, steps=8, channels=4)
>>> len(net.split(4))
4
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglight.inference import load as load
    from sglight.networks import StableNet as StableNet
    from sglight.parallel.strategy import StageStrategy as StageStrategy
    from sglight.strategies.backprop import Backprop as Backprop
    from sglight.strategies.blend import Blend as Blend
    from sglight.strategies.delayed import Delayed as Delayed
    from sglight.strategies.dni import DNI as DNI
    from sglight.strategies.local import Local as Local
    from sglight.strategies.multilevel import Multilevel as Multilevel
    from sglight.strategies.pvd import PVD as PVD

__version__ = "0.1.0"

# The module of each public name. They are imported on first use, because torch takes seconds to import.
_HOMES = {
    "Backprop": "sglight.strategies.backprop",
    "Blend": "sglight.strategies.blend",
    "DNI": "sglight.strategies.dni",
    "Delayed": "sglight.strategies.delayed",
    "Local": "sglight.strategies.local",
    "Multilevel": "sglight.strategies.multilevel",
    "PVD": "sglight.strategies.pvd",
    "StableNet": "sglight.networks",
    "StageStrategy": "sglight.parallel.strategy",
    "load": "sglight.inference",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sglight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
