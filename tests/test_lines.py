"""Lines that a user might type, made from the schema: none is a traceback, and no nonsense is accepted."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sglight.commandline import flags_first
from sglight.config.composing import CONF, check
from sglight.config.datasets import SCHEMAS as DATASETS
from sglight.config.effects import check_effects
from sglight.config.explanations import explain
from sglight.config.ranges import RANGES
from sglight.config.schema import STRATEGIES, Config, ModelConfig
from sglight.errors import UserError
from tests.lines import lines, numeric_keys

CHOICES = (
    ["strategy=backprop", "dataset=ellipse"], ["strategy=dni"], ["strategy=delayed", "dataset=hdf5"],
    ["strategy=multilevel", "model=resnet"], ["strategy=pvd", "model=antisymmetric", "dataset=image_folder"],
)  # fmt: skip


def refusal(cfg: DictConfig, parser: OverridesParser, line: str) -> str:
    """What the command answers to an override; empty if it is accepted. Anything but a sentence is an exception."""
    try:
        (override,) = parser.parse_overrides([line])
        if override.is_sweep_override():
            return f"{line} gives several values"
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False)
        check(cfg)
    except UserError as error:
        return str(error)
    except (OmegaConfBaseException, HydraException, ValueError) as error:
        return explain(error, CONF, [line])
    return ""


def numbers(value: Any) -> Iterator[float]:
    for each in value if isinstance(value, ListConfig) else [value]:
        if isinstance(each, int | float) and not isinstance(each, bool):
            yield each


def try_lines(compose_config: Any, count: int) -> dict[str, int]:
    parser, found = OverridesParser.create(), {"accepted": 0, "refused": 0}
    for seed, choices in enumerate(CHOICES):
        base = compose_config(*choices)
        for key, value in lines(base, count // len(CHOICES), seed):
            cfg, line = base.copy(), f"{key}={value}"
            told = refusal(cfg, parser, line)
            found["refused" if told else "accepted"] += 1
            if told:
                assert "\n" not in told and "Error" not in told, (line, told)
                assert re.search(key.rpartition(".")[2], told) or re.search(r"\w+(\.\w+)*=", told), (
                    line,
                    told,
                )
                continue
            for number in numbers(OmegaConf.select(cfg, key)):
                assert math.isfinite(number), line
                assert key not in RANGES or number in RANGES[key], line
    return found


def test_some_lines_are_refused_in_a_sentence_or_make_sense(compose_config) -> None:
    found = try_lines(compose_config, 200)
    assert min(found.values()) > 20, found


@pytest.mark.slow
def test_many_lines_are_refused_in_a_sentence_or_make_sense(compose_config) -> None:
    found = try_lines(compose_config, 500)
    print(found)
    assert sum(found.values()) == 500


def test_every_number_of_the_schema_has_a_range() -> None:
    sections = [("", Config), ("model.", ModelConfig)]
    sections += [("strategy.", schema) for schema in STRATEGIES.values()]
    sections += [("dataset.", schema) for schema in DATASETS.values()]
    keys = {key for prefix, schema in sections for key in numeric_keys(schema, prefix)}
    assert keys - set(RANGES) == set()


FOUND = {
    "levels": (["strategy=multilevel", "strategy.levels=1000000000"], r"levels=1000000000 .* at most 20"),
    "threads": (["trainer.threads=100000"], r"threads=100000 .* at most 1024"),
    "horizon": (["model.horizon=1e300"], r"horizon=1e\+300 .* at most 1000000"),
    "seed": (["seed=4294967296"], r"seed=4294967296 .* at most 4294967295"),
    "rates": (["strategy=multilevel", "strategy.level.lr=[1,nan]"], r"level\.lr=\[1, nan\] .* each of them"),
    "estimators": (
        ["strategy=multilevel", "strategy.level.estimator_lr=inf"],
        r"estimator_lr=inf .* at most",
    ),
    "scale": (["model.init_scale=inf"], r"init_scale=inf .* at most"),
    "memory": (
        ["model.channels=100000", "model.steps=1000"],
        r"channels=100000 .* would take 160 TB .* lower",
    ),
    "worst": (["callbacks.checkpoint.monitor=val/loss"], r"monitor=val/loss with mode=max .*mode=min"),
    "no time": (["trainer.max_time=00:00:00:00"], r"max_time=00:00:00:00 is no time"),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_was_once_a_traceback_is_a_sentence(compose_config, case: str) -> None:
    overrides, sentence = FOUND[case]
    with pytest.raises(UserError, match=sentence):
        check(compose_config(*overrides))


WITHOUT_EFFECT = (
    "strategy.optimizer.momentum=0.5", "strategy.optimizer.nesterov=true", "strategy.scheduler.gamma=0.5",
    "model.kernel_size=5", "model.groups=4", "strategy.scheduler.patience=2",
)  # fmt: skip


@pytest.mark.parametrize("line", WITHOUT_EFFECT)
def test_a_key_without_effect_is_refused_where_the_command_line_gives_it(compose_config, line: str) -> None:
    cfg, key = compose_config(line), line.partition("=")[0]
    with pytest.raises(UserError, match=rf"{key}=.* has no effect with .* choose "):
        check_effects(cfg, [key])
    check_effects(cfg, [])
    check_effects(compose_config(), [key])


def test_an_estimators_key_without_effect_is_refused(compose_config) -> None:
    with pytest.raises(UserError, match=r"strategy\.estimator\.kernel_size=.* has no effect with"):
        check_effects(
            compose_config("strategy=dni", "strategy.estimator.kernel_size=5"),
            ["strategy.estimator.kernel_size"],
        )


@pytest.mark.parametrize(
    ("key", "mode"), [("strategy.estimator.form=sobolev", "dni"), ("strategy.head.hidden=[8]", "local")]
)
def test_a_key_for_levels_that_there_are_not_is_refused(compose_config, key: str, mode: str) -> None:
    line, name = ["strategy=multilevel", key], key.partition("=")[0]
    with pytest.raises(
        UserError, match=rf"{name} has no effect with levels that are exact, delayed, .* have {mode}$"
    ):
        check_effects(compose_config(*line), [name])
    check_effects(compose_config(*line, f"strategy.level.mode=[exact,{mode}]"), [name])


def test_flags_may_come_behind_overrides() -> None:
    words = ["seed=1,2", "-m", "model=resnet", "--config-dir", "mine", "trainer.max_epochs=3"]
    assert flags_first(words) == [
        "-m",
        "--config-dir",
        "mine",
        "seed=1,2",
        "model=resnet",
        "trainer.max_epochs=3",
    ]
    with pytest.raises(UserError, match=r"write model=resnet, or add -m and write model=resnet,leapfrog to"):
        flags_first(["model=[resnet, leapfrog]"])
    with pytest.raises(UserError, match=r"--multirn is unknown; did you mean --multirun\?"):
        flags_first(["--multirn", "seed=1,2"])
    with pytest.raises(UserError, match=r"without dashes: trainer\.max_epochs="):
        flags_first(["--trainer.max_epochs=3"])
