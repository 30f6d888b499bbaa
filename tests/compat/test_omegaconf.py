"""The private parts of OmegaConf that sglight depends on are still there."""

from __future__ import annotations

from omegaconf import OmegaConf

from sglight.compat.omegaconf import root


def test_the_root_of_a_node_is_the_whole_config() -> None:
    cfg = OmegaConf.create({"a": {"b": {"c": 1}}})
    assert root(cfg.a.b) is cfg
    assert root(cfg) is cfg
