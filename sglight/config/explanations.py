"""Rephrases errors of Hydra and OmegaConf as one sentence that names the key and the remedy; imports no torch."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError

from sglight.compat.omegaconf import root
from sglight.config.quoting import typed

ELSEWHERE = {  # keys that users of Lightning look for, and what to use instead
    "trainer.accumulate_grad_batches": "cut a batch into pieces, whose gradients add up, by strategy.microbatches",
    "trainer.callbacks": "add one by '+callbacks.mine={_target_: package.module.Class}'",
    "trainer.default_root_dir": "use hydra.run.dir",
    "trainer.gradient_clip_algorithm": "use strategy.clip_norm",
    "trainer.gradient_clip_val": "use strategy.clip_norm",
    "trainer.logger": "choose logger=tensorboard, logger=csv, logger=[tensorboard,csv] or logger=none",
    "trainer.strategy": "where code runs follows from trainer.devices; how stages are trained is strategy=...",
}
EXTRAS = ("joblib", "submitit")  # optional dependencies that install a launcher
TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}


def explain(error: BaseException, conf: Path, overrides: Sequence[str] = ()) -> str:
    """One sentence about an error of Hydra or OmegaConf.

    Args:
        error: raised while the config was composed.
        conf: the folder of the config groups.
        overrides: the command line.
    """
    chain = list(_causes(error))
    if "Config group override must be a string" in str(error):
        return _not_a_choice(conf, overrides)
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}, is not valid YAML: {error.problem}"
    for cause in chain:
        if isinstance(cause, MissingConfigException) and cause.options is not None:
            return _unknown_choice(cause, conf)
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
            return unknown_key(str(cause.full_key), cause.parent_node, conf) + _origin(error)
        if isinstance(cause, ValidationError) and cause.parent_node is not None:
            return _wrong_type(cause) + _origin(error)
    return _rephrase(chain)


def unknown_key(key: str, parent: Any, conf: Path, known: Iterable[str] | None = None) -> str:
    """One sentence about an unknown key, with a guess at what was meant.

    Args:
        key: the dotted key.
        parent: the node in which it was looked for.
        conf: the folder of the config groups.
        known: the keys that `parent` may have; None for those that it has.
    """
    if key in ELSEWHERE:
        return f"{key} cannot be set: {ELSEWHERE[key]}"
    prefix, _, name = key.rpartition(".")
    siblings = (
        [str(k) for k in (parent if known is None else known)] if isinstance(parent, DictConfig) else []
    )
    if not prefix:
        siblings += [p.name for p in conf.iterdir() if p.is_dir() and p.name not in siblings]
    where = f"{prefix}." if prefix else ""
    close = [where + k for k in _close(name, siblings)]
    if owners := _owners(key, conf):
        return f"{key} is a key of {owners}, not of the chosen one; choose that, or leave the key out"
    if not close and isinstance(parent, DictConfig):
        close = [path for path in _paths(root(parent)) if path.endswith(f".{name}") and path != key]
    if close:
        return f"{key} is unknown; did you mean {_either(close)}?"
    if not siblings:
        return f"{key} is unknown; {prefix} is a value and has no keys of its own"
    return f"{key} is unknown; the keys here are {', '.join(sorted(where + s for s in siblings))}"


def did_you_mean(given: object, options: Iterable[str]) -> str:
    """The end of a message about a value that is none of `options`.

    >>> did_you_mean("eulr", ["euler", "leapfrog"])
    'did you mean euler? (one of euler, leapfrog)'
    """
    options = list(options)
    if close := _close(str(given), options):
        return f"did you mean {close[0]}? (one of {', '.join(options)})"
    return f"choose one of {', '.join(options)}"


def _close(name: str, options: list[str]) -> list[str]:
    """The options that are similar to `name`; if some have the same letters in another order, only these."""
    close = get_close_matches(name.lower(), options, 3)
    swapped = [option for option in close if sorted(option) == sorted(name.lower())]
    return swapped or close


def _unknown_choice(error: MissingConfigException, conf: Path) -> str:
    group, _, choice = str(error.missing_cfg_file).partition("/")
    if group == "hydra":
        group, choice = re.split(r"/(?=[^/]*$)", str(error.missing_cfg_file))
    options = list(error.options or ())
    if folder := choice.rpartition("/")[0]:
        inside = sorted((conf / group / folder).glob("*.yaml"))
        options = [f"{folder}/{file.stem}" for file in inside] or options
    if not choice:
        return f"there is no config {group}"
    if group == "hydra/launcher" and choice.partition("_")[0] in EXTRAS:
        extra = choice.partition("_")[0]
        return f"{group}={choice} is not installed; install it with pip install 'sglight[{extra}]'"
    return f"{group}={choice} is unknown; {did_you_mean(choice, options)}"


def _not_a_choice(conf: Path, overrides: Sequence[str]) -> str:
    """One sentence about a group that was given null or a number; Hydra does not say which one."""
    for override in overrides:
        group, _, choice = override.partition("=")
        options = sorted(f.stem for f in (conf / group).glob("*.yaml")) if group else []
        if options and choice not in options:
            return f"{override} is not allowed; {did_you_mean(choice, options)}"
    return "a group needs one of its choices as value, as in model=resnet; see --help"


def _wrong_type(error: ValidationError) -> str:
    hint = _hint(error)
    value = "null" if error.value is None else error.value
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"{error.full_key}={value} is not allowed; {did_you_mean(value, hint.__members__)}"
    if is_dataclass(hint):
        keys = ", ".join(f"{error.full_key}.{key}" for key in get_type_hints(hint))
        return f"{error.full_key}={value} is not allowed; set its keys instead: {keys}"
    if hint is None:
        return f"{error.full_key}={value} is not allowed: {_first_line(error)}"
    return f"{error.full_key}={value} is not allowed; it must be {_describe(hint)}"


def _hint(error: ValidationError) -> Any:
    """The type that the schema gives to the key of `error`, if there is one."""
    schema = OmegaConf.get_type(error.parent_node)
    if is_dataclass(schema):
        return get_type_hints(schema).get(str(error.key))
    return next(iter(get_args(error.ref_type)), None)


def _describe(hint: Any) -> str:
    """A type in plain English, such as `a whole number or null`."""
    if get_origin(hint) in (Union, UnionType):
        return _either([_describe(part) for part in get_args(hint)])
    if get_origin(hint) is list:
        return f"a list, as [1,2], each entry {_describe(get_args(hint)[0])}"
    return TYPE_NAMES.get(hint, f"a {getattr(hint, '__name__', hint)}")


REPHRASED = [
    (
        # Raised by the defaults list of config.yaml, whose choice of presets interpolates these groups.
        r"Interpolation key '(?P<o>[^']*)' not found\n\s*full_key: _dummy_",
        "{o} has no value; give one with {o}=...",
    ),
    (
        r"Interpolation key '(?P<i>[^']*)' not found\n\s*full_key: (?P<o>\S*)",
        "{o} refers to ${{{i}}}, which is no key",
    ),
    (
        r"Ambiguous value for argument '(?P<o>(?P<k>[^=\n]*)=(?P<v>[^\n]*/[^\n]*))'(?=\n|$)",
        "{o} gives several values; put a path with a comma in quotes: {typed}",
    ),
    (
        r"Ambiguous value for argument '(?P<o>[^\n]*)'(?=\n|$)",
        "{o} gives several values; add -m to run each, or [] for a list",
    ),
    (r"An item is already at '(?P<o>[^']*)'", "{o} is there already; write it without the +"),
    (r"Multiple values for (?P<o>[^.]*)\.", "{o} is chosen already; write it without the +"),
    (
        r"force-add of config groups is not supported: '\++(?P<o>[^']*)'",
        "++{o} is not possible for a group; write {o}",
    ),
    (r"Sweep parameters '(?P<o>(?s:.*))' requires", "{o} gives several values; add -m to run each of them"),
    (r"Error parsing override '(?P<o>(?s:.*?))'\nmissing EQUAL", "{o} is not of the form key=value"),
    (
        r"Error parsing override '(?P<o>(?P<k>[^=]*)=(?P<v>(?s:.*?)))'\n",
        "{o} cannot be read; close its brackets and quotes, or put the value in quotes: {typed}",
    ),
    (r"Error parsing override '(?P<o>[^=\n]*)'\n", "{o} is not of the form key=value"),
    (r"Could not delete.*'(?P<o>[^']*)' does not exist", "~{o}: there is no such key"),
    (r"does not support deletion\n\s*full_key: (?P<o>\S*)", "{o} cannot be removed; give it another value"),
]


def _rephrase(chain: list[BaseException]) -> str:
    for cause in chain:
        text = (
            f"Error parsing override '{cause.override}'\n{cause}"
            if isinstance(cause, OverrideParseException)
            else str(cause)
        )
        for pattern, sentence in REPHRASED:
            if found := re.search(pattern, text):
                parts = found.groupdict()
                hint = typed(parts["k"], parts["v"]) if "v" in parts else ""
                return sentence.format(**parts, typed=hint).replace("\n", r"\n")
    return next(filter(None, map(_first_line, chain)), type(chain[0]).__name__)


def _origin(error: BaseException) -> str:
    """` (in the config file x.yaml)` if the error was in a file, not on the command line."""
    found = re.match(r"In '([^']+)'", str(error))
    return f" (in the config file {found[1]}.yaml)" if found else ""


def _owners(key: str, conf: Path) -> str:
    """The choices of the key's group that have the key, as text."""
    group, _, rest = key.partition(".")
    files = sorted((conf / group).glob("*.yaml")) if rest else []
    return _either([f"{group}={f.stem}" for f in files if _has(OmegaConf.load(f), rest)])


def _has(cfg: Any, path: str) -> bool:
    return path in _paths(cfg)


def _paths(cfg: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys of `cfg` except Hydra's own."""
    plain: Any = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    for key, value in plain.items() if isinstance(plain, dict) else ():
        if prefix or key != "hydra":
            yield f"{prefix}{key}"
            yield from _paths(value, f"{prefix}{key}.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    text = str(error.msg) if isinstance(error, OmegaConfBaseException) else str(error)
    return text.strip().partition("\n")[0].rstrip(".")


def _either(options: list[str]) -> str:
    return ", ".join(options[:-1]) + " or " + options[-1] if len(options) > 1 else "".join(options)
