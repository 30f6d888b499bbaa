"""Whole configs that users might combine: what the config check accepts is trained and tested, whatever it is."""

from __future__ import annotations

import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sglight import start as start_module
from sglight.config.composing import check
from sglight.errors import Diverged, UserError
from tests.combinations import combinations
from tests.test_experiment import PICTURES

COMMON = (
    "trainer.accelerator=cpu", "trainer.threads=1", "callbacks.progress.enabled=false",
    "trainer.limit_train_batches=4", "trainer.limit_val_batches=2", "trainer.limit_test_batches=2",
    *(f"callbacks.{name}.enabled=false" for name in PICTURES),
)  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The folder of the small files of `combinations.DATASETS`."""
    for name, shape in (("pictures", (90, 8, 8, 3)), ("vectors", (90, 5))):
        generator = np.random.default_rng(1)
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"] = generator.standard_normal(shape).astype("float32")
            file["y"] = np.arange(90) % 3
    return tmp_path


def outcome(
    compose: Callable[..., DictConfig], words: list[str], values: dict[str, str], folder: Path
) -> str:
    """``trained``, ``refused`` in a sentence before the training, ``diverged``, or what went wrong."""
    cfg = compose(*COMMON, *words)
    known = {key: value for key, value in values.items() if key.rpartition(".")[2] in _keys(cfg, key)}
    line = " ".join([*words, *(f"{key}={value}" for key, value in known.items())])
    try:
        cfg = check(compose(*COMMON, *words, *(f"{key}={value}" for key, value in known.items())))
    except (UserError, OmegaConfBaseException) as error:
        return "refused" if isinstance(error, UserError) and "\n" not in str(error) else f"{line}: {error}"
    try:
        start_module.run(cfg, folder)
    except Diverged:
        return "diverged"
    except UserError as error:  # what only the data show
        before = not (folder / "checkpoints/last.ckpt").exists() and "\n" not in str(error)
        print(f"{line}: refused by the run: {error}")
        return "refused by the run" if before else f"{line}: refused after it was trained: {error}"
    except Exception:
        return f"{line}: {traceback.format_exc(limit=-6)}"
    return "trained"


def _keys(cfg: DictConfig, key: str) -> list[str]:
    """The keys beside this one; none if its section is not there."""
    section = OmegaConf.select(cfg, key.rpartition(".")[0])
    return list(map(str, section)) if isinstance(section, DictConfig) else []


def try_combinations(compose: Callable[..., DictConfig], folder: Path, count: int, seed: int) -> Counter[str]:
    found = Counter[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for k, (choices, values) in enumerate(combinations(count, seed)):
            words = [f"data_dir={folder}/store", *(word.format(folder=folder) for word in choices)]
            found[outcome(compose, words, values, folder / str(k))] += 1
    return found


def check_found(found: Counter[str]) -> None:
    wrong = set(found) - {"trained", "refused", "refused by the run", "diverged"}
    assert not wrong, f"{len(wrong)} of {found.total()}:\n" + "\n\n".join(sorted(wrong))


def test_some_configs_that_are_accepted_are_trained(compose_config, data: Path) -> None:
    check_found(try_combinations(compose_config, data, 14, seed=1))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_configs_that_are_accepted_are_trained(compose_config, data: Path) -> None:
    """Of ``SGLIGHT_COMBINATIONS`` configs, 24 by default; 105 take five minutes."""
    count = int(os.environ.get("SGLIGHT_COMBINATIONS", 24))
    found = try_combinations(compose_config, data, count, seed=103)
    print(found)
    check_found(found)
    assert found["trained"] > count // 5, found
