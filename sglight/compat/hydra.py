"""Parts of Hydra that are not documented."""

from __future__ import annotations

from functools import wraps
from typing import Any

from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig


def config_groups() -> dict[str, set[str]]:
    """The config files of each group, in all folders that Hydra searches; only while Hydra composes or runs."""
    choices: dict[str, set[str]] = {}
    for source in GlobalHydra.instance().config_loader().get_sources():
        if source.provider == "hydra" or source.scheme() == "structured":
            continue
        for group in source.list("", ObjectType.GROUP):
            choices.setdefault(group, set()).update(source.list(group, ObjectType.CONFIG))
    return choices


def hide_schemas(prefix: str) -> None:
    """Hide configs of the ConfigStore whose names begin with ``prefix`` from completion and lists of choices.

    These are schemas for the `defaults` of files; they are no choices themselves.
    """
    list_all = getattr(ConfigStore.list, "__wrapped__", ConfigStore.list)

    @wraps(list_all)
    def list_choices(self: ConfigStore, path: str) -> list[str]:
        return [name for name in list_all(self, path) if not name.startswith(prefix)]

    ConfigStore.list = list_choices  # type: ignore[method-assign]


def skip_unused_group_lists() -> None:
    """Make ``--help`` faster: Hydra would list the groups for its template even if that does not show them.

    For each group Hydra copies its whole store of configs, which takes two thirds of the time of ``--help``.
    """
    full_help = getattr(Hydra.get_help, "__wrapped__", Hydra.get_help)

    @wraps(full_help)
    def get_help(self: Any, help_cfg: DictConfig, *args: Any, **kwargs: Any) -> str:
        if "CONFIG_GROUPS" not in help_cfg.template:
            self.format_config_groups = lambda *_, **__: ""
        text: str = full_help(self, help_cfg, *args, **kwargs)
        return text

    Hydra.get_help = get_help  # type: ignore[method-assign]


def set_hydra_config(cfg: DictConfig) -> None:
    """Make `HydraConfig.get`, which resolvers use, return the node ``hydra`` of this config."""
    HydraConfig.instance().set_config(cfg)
