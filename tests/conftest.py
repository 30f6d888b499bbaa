"""What all tests share: composed configs, the data beside the project, one thread."""

import os
import pickle
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from sglight.config.composing import CONF

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    # Under nohup hang-ups are ignored, in all processes that tests start too.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests and whole commands first: so two processes end at about the same time."""
    items.sort(
        key=lambda item: item.path.name != "test_workers.py" and item.get_closest_marker("slow") is None
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The cores belong to the test processes; the environment is for the commands that tests start."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def without_hydra() -> None:
    """No test finds the config of a command that ran in this process before."""
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with `MNIST/raw` and `cifar10-images.tar`: `SGLIGHT_TEST_DATA`, or `../shared/data`."""
    folder = Path(os.environ.get("SGLIGHT_TEST_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; set SGLIGHT_TEST_DATA")
    return folder


@pytest.fixture
def compose_config() -> Callable[..., DictConfig]:
    """`compose_config("model=resnet", "seed=2")` gives the config of that command line.

    Hydra composes the same choices once; it then gives keys their values in a copy.
    """

    def composed(*overrides: str, hydra: bool = False) -> DictConfig:
        if hydra or any("hydra" in each or "@" in each for each in overrides):
            return _compose(overrides, hydra)
        choices, values = [], []
        for text, override in zip(overrides, PARSER.parse_overrides(list(overrides)), strict=True):
            (choices if (CONF / override.key_or_group).is_dir() else values).append((text, override))
        cfg: DictConfig = pickle.loads(_pickled(tuple(text for text, _ in choices)))
        ConfigLoaderImpl._apply_overrides_to_config([override for _, override in values], cfg)
        return cfg

    return composed


PARSER = OverridesParser.create()


@cache
def _pickled(choices: tuple[str, ...]) -> bytes:
    return pickle.dumps(_compose(choices))


def _compose(overrides: tuple[str, ...], hydra: bool = False) -> DictConfig:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="sglight"):
        return compose("config", overrides=list(overrides), return_hydra_config=hydra)


@pytest.fixture
def start(compose_config: Callable[..., DictConfig]) -> Callable[..., float]:
    """``start(folder, *overrides)`` does a small run by backpropagation."""
    from sglight import start as start_module  # loads torch, which few tests need
    from sglight.config.composing import check
    from tests.test_experiment import SMALL

    def run(folder: Path, *overrides: str) -> float:
        return start_module.run(check(compose_config(*SMALL, "strategy=backprop", *overrides)), folder)

    return run
