"""Private parts of OmegaConf that we lean on."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig


def root(node: DictConfig) -> Any:
    """The whole config that a node is part of."""
    return node._get_root()
