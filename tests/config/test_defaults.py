"""Defaults stand in the schemas: YAML files and constructors have the same ones."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from sglight.config.datasets import SCHEMAS as DATASETS
from sglight.config.schema import CALLBACKS, STRATEGIES, ModelConfig, TrainerConfig
from sglight.networks.network import NetworkSpec
from sglight.networks.segment import Segment


def plain(node: Any) -> dict[str, Any]:
    found = OmegaConf.to_container(
        node if OmegaConf.is_config(node) else OmegaConf.structured(node), enum_to_str=True
    )
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategys_file_and_its_constructor_have_the_schemas_defaults(
    compose_config: Any, name: str
) -> None:
    schema = STRATEGIES[name]
    expected = plain(schema)
    assert plain(compose_config(f"strategy={name.removeprefix('base_')}").strategy) == expected
    arguments = inspect.signature(get_class(schema._target_)).parameters
    for key, argument in arguments.items():
        # Sections that are left out have their schema's defaults.
        if key in expected and argument.default not in (argument.empty, None):
            assert argument.default == expected[key], key


@pytest.mark.parametrize("name", ["antisymmetric", "hamiltonian", "leapfrog", "resnet"])
def test_a_models_file_has_the_schemas_defaults(compose_config: Any, name: str) -> None:
    found = plain(compose_config(f"model={name}").model)
    assert {**found, "dynamics": "???"} == plain(ModelConfig)


def test_a_network_in_a_script_has_the_schemas_defaults() -> None:
    expected = plain(ModelConfig) | {"dynamics": "hamiltonian"}  # in a config the model decides
    for field in dataclasses.fields(NetworkSpec):
        if field.name in expected and field.default is not dataclasses.MISSING:
            assert field.default == expected[field.name], field.name
    for name, argument in inspect.signature(Segment).parameters.items():
        if name in expected and argument.default is not argument.empty:
            assert argument.default == expected[name], name


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_sets_constructor_has_the_schemas_defaults(name: str) -> None:
    schema = DATASETS[name]
    expected = {key: value for key, value in vars(schema()).items() if "${" not in str(value)}
    compared = set()
    for kind in get_class(schema._target_).__mro__:
        for key, argument in inspect.signature(kind.__init__).parameters.items():
            if key in expected and key not in compared and argument.default is not argument.empty:
                compared.add(key)
                if expected[key] != "???":
                    assert argument.default == expected[key], f"{kind.__name__}: {key}"
    assert len(compared) > 4


def test_the_files_of_trainer_and_callbacks_have_the_schemas_defaults(compose_config: Any) -> None:
    cfg = compose_config()
    assert plain(cfg.trainer) == plain(TrainerConfig)
    assert plain(cfg.callbacks) == {key: plain(schema) for key, schema in CALLBACKS.items()}
    for key, schema in CALLBACKS.items():
        target = plain(schema).get("_target_", "")
        if target.startswith("sglight.") and key != "early_stopping":  # whose defaults are Lightning's
            for name, argument in inspect.signature(get_class(target)).parameters.items():
                assert argument.default == plain(schema).get(name, argument.default), f"{key}.{name}"
