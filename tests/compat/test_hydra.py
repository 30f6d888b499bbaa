"""The undocumented parts of Hydra that sglight depends on are still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from sglight.compat.hydra import config_groups, hide_schemas, set_hydra_config, skip_unused_group_lists


def test_groups_and_choices_are_those_of_the_folder(tmp_path: Path) -> None:
    for name in ("model/small", "model/large", "data/real"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert config_groups() == {"model": {"small", "large"}, "data": {"real"}}


def test_the_config_of_hydra_is_the_one_that_is_set() -> None:
    before = HydraConfig.instance().cfg
    cfg = OmegaConf.create({"hydra": HydraConf()})
    cfg.hydra.job.name = "mine"
    try:
        set_hydra_config(cfg)
        assert HydraConfig.get().job.name == "mine"
    finally:
        HydraConfig.instance().cfg = before


def test_schemas_are_not_offered_but_compose(tmp_path: Path) -> None:
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "small.yaml").write_text("defaults: [base_model]\n")
    store = ConfigStore.instance().store
    store(group="toys", name="base_model", node={"a": 1})
    store(group="toys", name="other", node={"a": 2})
    hide_schemas("base_")
    hide_schemas("base_")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        assert loader.get_group_options("toys") == ["other", "small"]
        assert compose(overrides=["+toys=small"]).toys.a == 1


@pytest.mark.parametrize(("template", "lists"), [("usage", 0), ("$APP_CONFIG_GROUPS", 2)])
def test_help_lists_groups_only_if_its_template_shows_them(
    tmp_path: Path, template: str, lists: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Any] = []
    monkeypatch.setattr(Hydra, "list_all_config_groups", lambda self, parent="": listed.append(parent) or [])
    skip_unused_group_lists()
    skip_unused_group_lists()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        hydra: Any = GlobalHydra.instance().hydra
        cfg = OmegaConf.create({"template": template})
        assert hydra.get_help(cfg, cfg, get_args_parser(), resolve=False) == template.replace(
            "$APP_CONFIG_GROUPS", ""
        )
    assert len(listed) == lists
