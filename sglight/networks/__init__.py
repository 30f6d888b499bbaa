"""Deep stable networks: discretised differential equations, whole or cut into stages."""

from sglight.networks.network import NetworkSpec, StableNet, Stage
from sglight.networks.segment import Segment

__all__ = ["NetworkSpec", "Segment", "StableNet", "Stage"]
