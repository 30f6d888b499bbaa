"""Private parts of OmegaConf that sglight depends on."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig


def root(node: DictConfig) -> Any:
    """The whole config to which a node belongs."""
    return node._get_root()
