"""Defaults stand in the schemas: YAML files and constructors have the same ones."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from sglight.config.schema import CALLBACKS, STRATEGIES, ModelConfig, TrainerConfig
from sglight.networks.network import NetworkSpec


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
    expected = plain(ModelConfig) | {
        "horizon": 1.0,
        "dynamics": "hamiltonian",
    }  # those that a file always says
    for field in dataclasses.fields(NetworkSpec):
        if field.name in expected and field.default is not dataclasses.MISSING:
            assert field.default == expected[field.name], field.name


def test_the_files_of_trainer_and_callbacks_have_the_schemas_defaults(compose_config: Any) -> None:
    cfg = compose_config()
    assert plain(cfg.trainer) == plain(TrainerConfig)
    assert plain(cfg.callbacks) == {key: plain(schema) for key, schema in CALLBACKS.items()}
    for key, schema in CALLBACKS.items():
        target = plain(schema).get("_target_", "")
        if target.startswith("sglight.") and key != "early_stopping":  # whose defaults are Lightning's
            for name, argument in inspect.signature(get_class(target)).parameters.items():
                assert argument.default == plain(schema).get(name, argument.default), f"{key}.{name}"
