"""Deep stable networks, and training strategies that break the lock along depth."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglight.inference import load as load
    from sglight.networks import StableNet as StableNet

# Imported when they are asked for: the command checks its config before it imports torch.
_HOMES = {"load": "sglight.inference", "StableNet": "sglight.networks"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sglight' has no attribute {name!r}")
