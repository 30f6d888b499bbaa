"""Parts of Hydra that are not documented."""

from __future__ import annotations

from functools import wraps

from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig


def config_groups() -> dict[str, set[str]]:
    """The choices of each group that are files, in all folders that Hydra searches, while it composes or runs."""
    choices: dict[str, set[str]] = {}
    for source in GlobalHydra.instance().config_loader().get_sources():
        if source.provider == "hydra" or source.scheme() == "structured":
            continue
        for group in source.list("", ObjectType.GROUP):
            choices.setdefault(group, set()).update(source.list(group, ObjectType.CONFIG))
    return choices


def hide_schemas(prefix: str) -> None:
    """Let completion and lists of choices pass over configs of the ConfigStore with names that begin so.

    Files begin with them; they are no choices by themselves.
    """
    list_all = getattr(ConfigStore.list, "__wrapped__", ConfigStore.list)

    @wraps(list_all)
    def list_choices(self: ConfigStore, path: str) -> list[str]:
        return [name for name in list_all(self, path) if not name.startswith(prefix)]

    ConfigStore.list = list_choices  # type: ignore[method-assign]


def set_hydra_config(cfg: DictConfig) -> None:
    """Let `HydraConfig.get` give the node ``hydra`` of this config, from which resolvers read."""
    HydraConfig.instance().set_config(cfg)
