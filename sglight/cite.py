"""The command `python -m sglight.cite strategy=... model=...` prints BibTeX of the methods used; imports no torch."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sglight.config.composing import CONF, to_plain
from sglight.config.explanations import explain
from sglight.config.levels import make_levels
from sglight.output import tolerate

USAGE = """usage: python -m sglight.cite [group=choice ...] [key=value ...]

Prints the BibTeX of the methods that a run with these keys uses. The keys are those of python -m sglight; see its
--help."""

FILE = Path(__file__).with_name("citations.bib")
DYNAMICS = {
    "euler": ["haber2017"],
    "antisymmetric": ["haber2017"],
    "hamiltonian": ["haber2017", "chang2018reversible"],
    "leapfrog": ["haber2017"],
}
# Papers by strategy, or by mode of a level.
STRATEGIES = {
    "blend": ["jaderberg2017"],
    "delayed": ["huo2018decoupled", "narayanan2019", "narayanan2021"],
    "dni": ["jaderberg2017"],
    "local": ["belilovsky2020"],
    "multilevel": ["haber2017", "chang2018multilevel"],
    "pvd": ["ferris1994"],
}
STASHED = ["huo2018decoupled", "narayanan2019"]  # a blend whose true gradients arrive later
BACKWARD = {"replayed": ["huo2018replay"], "rebuilt": ["rivaud2025"]}
OPTIMIZERS = {"adam": ["kingma2015"], "adamw": ["loshchilov2019"], "nadam": ["dozat2016"]}


def main(overrides: list[str] | None = None) -> None:
    """Run the command; a mistake ends it with one sentence and status 1."""
    tolerate()
    given = sys.argv[1:] if overrides is None else overrides
    if {"-h", "--help"} & set(given):
        print(USAGE)
        return
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="sglight"):
            config = compose("config", overrides=given, return_hydra_config=True)
        strategy = config.hydra.runtime.choices.strategy
        plain = {name: to_plain(config[name]) for name in ("model", "strategy")}
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {explain(error, CONF, given)}")
    known = entries()
    print("\n\n".join(known[key] for key in dict.fromkeys(cited(strategy, plain))))


def cited(strategy: str, config: Mapping[str, Any]) -> Iterator[str]:
    """The keys of the papers on which a config is based; a key may come twice.

    Args:
        strategy: the choice of that group.
        config: ``model`` and ``strategy``, plain.
    """
    model, settings = config["model"], config["strategy"]
    yield "sglight"
    yield from DYNAMICS.get(model["dynamics"], [])
    yield from STRATEGIES.get(strategy, [])
    modes = _modes(strategy, settings)
    for mode in sorted(modes):
        yield from STRATEGIES.get(mode, [])
    if strategy == "backprop" and settings["stages"] > 1:
        yield "narayanan2021"
    if "delayed" in modes:
        yield from BACKWARD.get(settings["backward"], [])
    if strategy == "blend" and settings["arrival"] == "late":
        yield from STASHED
    if "local" in modes and settings["head"]["loss"] == "predsim":
        yield "nokland2019"
    if "dni" in modes and settings["estimator"]["form"] == "sobolev":
        yield "czarnecki2017"
    optimizer = settings.get("optimizer", {}).get("name")
    yield from OPTIMIZERS.get(optimizer, [])
    if optimizer == "nadam" and "delayed" in modes:
        yield "ajanthan2025"


def _modes(strategy: str, settings: Mapping[str, Any]) -> set[str]:
    """How stages are trained: the strategy, also the one with which it blends, or the modes of its levels."""
    if strategy == "blend":
        return {strategy, "local" if settings["source"] == "local" else "dni"}
    if strategy != "multilevel":
        return {strategy}
    return {level.mode for level in make_levels(settings["levels"], {"mode": settings["level"]["mode"]})}


def entries() -> dict[str, str]:
    """The entries of ``citations.bib`` by their keys."""
    found = FILE.read_text(encoding="utf-8").strip().split("\n\n")
    return {re.match(r"@\w+\{(\w+),", entry)[1]: entry for entry in found}  # type: ignore[index]


if __name__ == "__main__":
    main()
