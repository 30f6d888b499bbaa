"""The words of a command before Hydra reads them: flags first, and mistakes that Hydra would answer with its usage."""

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

# Hydra's flags, and whether a value follows.
FLAGS = {
    "--help": False, "-h": False, "--hydra-help": False, "--version": False, "--cfg": True, "-c": True,
    "--resolve": False, "--package": True, "-p": True, "--run": False, "-r": False, "--multirun": False, "-m": False,
    "--shell-completion": False, "-sc": False, "--config-path": True, "-cp": True, "--config-name": True, "-cn": True,
    "--config-dir": True, "-cd": True, "--experimental-rerun": True, "--info": False, "-i": False,
}  # fmt: skip
GROUPS = ("dataset", "model", "strategy", "trainer", "callbacks", "logger", "experiment", "debug")
SEVERAL = ("callbacks", "logger")  # groups of which a run may have more than one
INFOS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def arranged(words: Sequence[str]) -> list[str]:
    """The flags with their values, then the overrides, which may come in any order.

    Raises:
        UserError: for a flag that there is not.
    """
    flags, overrides = list[str](), list[str]()
    rest = iter(words)
    for word in rest:
        name = word.partition("=")[0]
        if not word.startswith("-") or re.fullmatch(r"-?[\d.]+", word):
            _check_choice(word)
            overrides.append(word)
            continue
        if name not in FLAGS:
            raise UserError(f"{name} is unknown; {_meant(name)}")
        flags.append(word)
        if FLAGS[name] and "=" not in word:
            flags += [value for value in [next(rest, None)] if value is not None]
        elif name in ("--info", "-i") and "=" not in word and (value := next(rest, None)) is not None:
            (flags if value in INFOS else overrides).append(value)
    return [*flags, *overrides]


def _check_choice(word: str) -> None:
    """Refuse a list of choices, of which Hydra would take none or all."""
    group, _, value = word.partition("=")
    if group in GROUPS and group not in SEVERAL and value.startswith("["):
        choices = value.strip("[] ").replace(" ", "")
        first, several = choices.partition(",")[0], f", or add -m and write {group}={choices} to run each"
        raise UserError(
            f"{word} is a list, but there is one {group}; write {group}={first}{several if ',' in choices else ''}"
        )


def _meant(name: str) -> str:
    if (key := name.lstrip("-")) and "." in key:
        return f"keys are written without dashes: {key}=..."
    return did_you_mean(name, [flag for flag in FLAGS if flag.startswith("--")])


def python(module: str) -> str:
    """The command that runs a module by this very Python, as it can be typed here: ``.venv/bin/python -m sglight``."""
    return f"{_typed(Path(sys.executable))} -m {module}"


def tensorboard() -> str:
    """The command that starts TensorBoard beside this very Python."""
    script = Path(sys.executable).with_name("tensorboard")
    return _typed(script) if script.is_file() else python("tensorboard.main")


def _typed(program: Path) -> str:
    """A program by its name alone if the shell finds this one by it, otherwise by its path from here."""
    found = shutil.which(program.name)
    if found is not None and os.path.abspath(found) == os.path.abspath(program):
        return program.name
    here = os.path.relpath(program)
    return shlex.quote(str(program) if here.startswith(os.pardir) else here)
