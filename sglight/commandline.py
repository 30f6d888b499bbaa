"""Sorts the arguments of a command for Hydra, and explains mistakes for which Hydra would only print its usage."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sglight.config.explanations import did_you_mean
from sglight.errors import UserError

# Hydra's flags, and whether each is followed by a value.
FLAGS = {
    "--help": False, "-h": False, "--hydra-help": False, "--version": False, "--cfg": True, "-c": True,
    "--resolve": False, "--package": True, "-p": True, "--run": False, "-r": False, "--multirun": False, "-m": False,
    "--shell-completion": False, "-sc": False, "--config-path": True, "-cp": True, "--config-name": True, "-cn": True,
    "--config-dir": True, "-cd": True, "--experimental-rerun": True, "--info": False, "-i": False,
}  # fmt: skip
GROUPS = ("dataset", "model", "strategy", "trainer", "callbacks", "logger", "experiment", "debug")
SEVERAL = ("callbacks", "logger")  # groups of which a run may have more than one
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command with all flags, and their values, before the overrides.

    Raises:
        UserError: for an unknown flag, or several choices of a group that takes one.

    >>> flags_first(["strategy=dni", "-m", "seed=1,2"])
    ['-m', 'strategy=dni', 'seed=1,2']
    """
    flags, overrides = list[str](), list[str]()
    rest = iter(arguments)
    for argument in rest:
        name = argument.partition("=")[0]
        if not argument.startswith("-") or re.fullmatch(r"-?[\d.]+", argument):
            _check_choice(argument)
            overrides.append(argument)
            continue
        if name not in FLAGS:
            raise UserError(f"{name} is unknown; {_meant(name)}")
        flags.append(argument)
        if FLAGS[name] and "=" not in argument:
            flags += [value for value in [next(rest, None)] if value is not None]
        elif name in ("--info", "-i") and "=" not in argument and (value := next(rest, None)) is not None:
            (flags if value in INFOS else overrides).append(value)
    return [*flags, *overrides]


def _check_choice(override: str) -> None:
    """Refuse a list of choices for a group that takes one; Hydra would take all of them, or none."""
    group, _, value = override.partition("=")
    if group in GROUPS and group not in SEVERAL and value.startswith("["):
        choices = value.strip("[] ").replace(" ", "")
        first, several = choices.partition(",")[0], f", or add -m and write {group}={choices} to run each"
        raise UserError(
            f"{override} is a list, but there is one {group}; write {group}={first}{several if ',' in choices else ''}"
        )


def _meant(name: str) -> str:
    """What an unknown flag may have been meant to be, as text."""
    if (key := name.lstrip("-")) and "." in key:
        return f"keys are written without dashes: {key}=..."
    return did_you_mean(name, [flag for flag in FLAGS if flag.startswith("--")])


def python(module: str) -> str:
    """The command that runs a module with this Python, as it can be typed here: ``.venv/bin/python -m sglight``."""
    return f"{_typed(Path(sys.executable))} -m {module}"


def tensorboard() -> str:
    """The command that starts the TensorBoard installed with this Python."""
    script = Path(sys.executable).with_name("tensorboard")
    return _typed(script) if script.is_file() else python("tensorboard.main")


def _typed(program: Path) -> str:
    """The name of a program if the shell finds it by that, else its path from the current directory."""
    found = shutil.which(program.name)
    if found is not None and os.path.abspath(found) == os.path.abspath(program):
        return program.name
    here = os.path.relpath(program)
    return shlex.quote(str(program) if here.startswith(os.pardir) else here)
