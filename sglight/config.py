"""Registers the schemas of the config groups with Hydra; imports no torch."""

from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import Container, OmegaConf

from sglight.data.schema import SCHEMAS as DATASETS
from sglight.schema import STRATEGIES, Config


def register() -> None:
    """Make the schemas known to Hydra under the names that the files in `conf/` begin with."""
    store = ConfigStore.instance().store
    store(name="base_config", node=Config)
    for name, dataset in DATASETS.items():
        store(group="dataset", name=name, node=dataset)
    for name, strategy in STRATEGIES.items():
        store(group="strategy", name=name, node=strategy)


def to_plain(node: Container) -> dict[str, Any]:
    """`node` as plain containers, resolved, its enums as their lower-case names."""
    return cast(
        dict[str, Any], OmegaConf.to_container(node, resolve=True, enum_to_str=True)
    )


register()
