"""The schemas: every leaf in conf/dataset spells out every key, with a comment, and builds its class."""

import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from sglight.config.datasets import SCHEMAS

CONF = Path(__file__).parents[2] / "conf" / "dataset"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))


def compose(name, *overrides):
    store = ConfigStore.instance()
    for schema, node in SCHEMAS.items():
        store.store(group="dataset", name=schema, node=node)
    with hydra.initialize_config_dir(str(CONF.parent), version_base="1.3"):
        return hydra.compose(overrides=[f"+dataset={name}", "+seed=1", "+data_dir=data", *overrides]).dataset


@pytest.mark.parametrize("name", NAMES)
def test_each_key_is_there_with_a_comment(name):
    lines = (CONF / f"{name}.yaml").read_text().splitlines()
    body = [line for line in lines if line and line[0] not in "# "]
    keys = {line.split(":")[0] for line in body} - {"defaults"}
    assert keys == set(compose(name))
    assert all("# " in line for line in body if not line.startswith("defaults"))
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_each_config_builds_its_data_module(name, tmp_path):
    overrides = {"image_folder": ["dataset.archive=x.tar"], "hdf5": ["dataset.path=x.h5"]}.get(name, [])
    config = compose(name, *overrides)
    data = hydra.utils.instantiate(config)
    assert data.name == config.name
    assert data.batch_size == config.batch_size


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_of_python_and_yaml_agree_in_type(name):
    OmegaConf.to_container(compose(name), resolve=True, throw_on_missing=True)


def test_no_heavy_import():
    heavy = "import sys, sglight.config.datasets; assert not {'torch', 'h5py', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", heavy], check=True)
