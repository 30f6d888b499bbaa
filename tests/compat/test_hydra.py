"""What we lean on in Hydra is still there."""

from __future__ import annotations

from pathlib import Path

from hydra import initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from sglight.compat.hydra import config_groups, set_hydra_config


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
