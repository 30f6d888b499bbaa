"""Groups runs that differ only in their seeds, and finds the keys in which groups differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any, TypeVar

from sglight import units
from sglight.config import completed
from sglight.errors import UserError
from sglight.report.runs import COMPARED, NAMES, Run

T = TypeVar("T")

# Keys and sections on which the results of a run do not depend.
IRRELEVANT = (*completed.IRRELEVANT, "dataset.raw_dir")
# Keys whose values follow from the name of a choice.
IMPLIED = {
    "dataset.name": "dataset",
    "dataset._target_": "dataset",
    "model.dynamics": "model",
    "strategy._target_": "strategy",
}


# Keys of the data set that change neither its samples nor their splits.
SAME_DATA = (
    "_target_", "name", "batch_size", "eval_batch_size", "seed", "data_dir", "raw_dir", "download", "memory_limit",
    "augment", "crop_padding", "flip",
)  # fmt: skip
LENGTH = ("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches")


@dataclass(frozen=True)
class Group:
    """The runs of one setting.

    Attributes:
        number: of the group in the report.
        columns: the values in which it differs from other groups, by key.
        runs: all of them.
        titles: short names of the keys.
        parts: the parts of its label, such as ``dni`` and ``lag 2``, without values that most groups share.
    """

    number: int
    columns: Mapping[str, Any]
    runs: Sequence[Run]
    titles: Mapping[str, str]
    parts: Sequence[str]

    @property
    def label(self) -> str:
        """The name of the group: ``dni · lag 2``."""
        return " · ".join(self.parts)

    @cached_property
    def finished(self) -> list[Run]:
        """The runs over which results are averaged: the finished ones, of equal ones the newest only."""
        finished = sorted((run for run in self.runs if run.state == "finished"), key=lambda run: run.changed)
        newest = {_frozen({**identity(run.config), "seed": run.seed}): run for run in finished}
        return [run for run in self.runs if any(run is each for each in newest.values())]

    @property
    def counted(self) -> dict[str, int]:
        """The number of runs in each state; ``repeated`` are finished runs with a newer equal one."""
        states = Counter(run.state for run in self.runs)
        repeated = states["finished"] - len(self.finished)
        states["finished"] -= repeated
        return {**{k: n for k, n in states.items() if n}, **({"repeated": repeated} if repeated else {})}

    @cached_property
    def mixed(self) -> list[str]:
        """The keys other than seeds in which its runs differ; empty unless ``--by`` has put them together."""
        return differing([run.config for run in self.runs])


@dataclass(frozen=True)
class Task:
    """The groups that were trained on the same data for as many epochs.

    Attributes:
        dataset: the name of the data, with the values in which it differs from other tasks of that name.
        groups: to be compared.
        differences: the keys in which the configs of the groups differ.
    """

    dataset: str
    groups: Sequence[Group]
    differences: Sequence[str] = ()


def tasks(runs: Iterable[Run], by: Sequence[str] = ()) -> list[Task]:
    """Groups runs, and collects the groups that may be compared: those with the same data and number of epochs.

    Args:
        runs: to be grouped. Runs that are not compared (`Run.aside`) make no group of their own.
        by: keys of the config (or their last parts), or names of choices, by which to group; if empty, all keys except
            seeds.

    Raises:
        UserError: if no run has one of the keys ``by``.
    """
    known = [run for run in runs if run.config and not (run.aside and run.state in COMPARED)]
    by = [_key(name, known) for name in by]
    parts = _split(known, lambda run: _frozen(_training(run.config, by)))
    parts = {key: members for key, members in parts.items() if any(not run.aside for run in members)}
    trainings = [_training(members[0].config, by) for members in parts.values()]
    numbers = count()
    return [
        _task(_title(training, trainings), members, by, numbers)
        for training, members in zip(trainings, parts.values(), strict=True)
    ]


def _training(config: Mapping[str, Any], by: Sequence[str]) -> dict[str, Any]:
    """The data and the length of the training of a run, without the keys ``by`` which to compare."""
    data = {
        key: value
        for key, value in config.items()
        if key.startswith("dataset.") and key.partition(".")[2] not in SAME_DATA and not key.endswith("seed")
    }
    length = {key: config.get(key) for key in LENGTH}
    return {"dataset": config.get("dataset"), **{k: v for k, v in {**data, **length}.items() if k not in by}}


def _title(training: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The name of the data, with the values in which they differ from others of that name."""
    alike = [each for each in others if each["dataset"] == training["dataset"]]
    parts = [str(training["dataset"])]
    for key, value in training.items():
        if value is not None and len({_frozen(each.get(key)) for each in alike}) > 1:
            name = key.rpartition(".")[2]
            parts.append(units.plural(value, "epoch") if name == "max_epochs" else f"{name} {show(value)}")
    return ", ".join(parts)


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are equal in all runs of a group: those of all relevant keys except seeds."""
    # A resumed run belongs to the group of the run that it continues; a test belongs to its checkpoint.
    left_out = IRRELEVANT if config.get("mode") == "test" else (*IRRELEVANT, "ckpt")
    return {
        key: value for key, value in config.items() if key not in NAMES and not _is_left_out(key, left_out)
    }


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of choices and the keys of `identity` in which configs differ.

    Keys whose values follow from the name of a choice are left out.
    """
    names = [name for name in NAMES[:3] if len({config.get(name) for config in configs}) > 1]
    identities = [identity(config) for config in configs]
    keys = dict.fromkeys(key for each in identities for key in each)
    varied = [key for key in keys if len({_frozen(each[key]) for each in identities if key in each}) > 1]
    return names + [key for key in varied if not (key in IMPLIED and _follows(configs, key, IMPLIED[key]))]


def show(value: Any) -> str:
    """A value of a config as on the command line; of a path the last part.

    >>> show(True), show(None), show([1, 0.5]), show("/data/digits")
    ('true', 'null', '[1, 0.5]', 'digits')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, str) and value.startswith("/"):
        return value.rstrip("/").rpartition("/")[2]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _task(dataset: str, runs: Sequence[Run], by: Sequence[str], numbers: Iterator[int]) -> Task:
    """The task of some runs: their groups, in order of the values in which these differ."""
    keys = list(by) or _columns(runs)
    together = _split(
        runs, lambda run: _frozen({k: run.config.get(k) for k in by} if by else identity(run.config))
    )
    compared = [members for members in together.values() if any(not run.aside for run in members)]
    ordered = sorted(compared, key=lambda group: [_order(group[0].config.get(k)) for k in keys])
    columns = [{key: group[0].config[key] for key in keys if key in group[0].config} for group in ordered]
    titles = _titles(keys, runs)
    groups = [
        Group(next(numbers), values, members, titles, parts)
        for values, members, parts in zip(columns, ordered, _parts(columns, titles), strict=True)
    ]
    differences = [
        key for key in differing([run.config for run in runs]) if key not in NAMES or key not in keys
    ]
    return Task(dataset, groups, differences)


def _columns(runs: Sequence[Run]) -> list[str]:
    """The keys by which to group: the strategy, the model if it varies, and keys that vary between equal choices."""
    configs = [run.config for run in runs]
    varied = [k for k in ("strategy", "model") if k == "strategy" or len({c.get(k) for c in configs}) > 1]
    alike = _split(runs, lambda run: tuple(run.config.get(name) for name in NAMES[:3]))
    keys = dict.fromkeys(k for part in alike.values() for k in differing([run.config for run in part]))
    return [*varied, *keys]


def _titles(keys: Sequence[str], runs: Sequence[Run]) -> dict[str, str]:
    """Short names of keys: the shortest ending that no other key has, such as ``lag`` or ``progress.enabled``."""
    every = {key for run in runs for key in run.config}

    def shortest(key: str) -> str:
        parts = key.split(".")
        endings = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        return next(e for e in endings if e == key or sum(k == e or k.endswith(f".{e}") for k in every) == 1)

    return {key: shortest(key) for key in keys}


def _parts(columns: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[list[str]]:
    """The parts of the labels of groups, without values that most groups share, unless labels would be equal then."""
    shared = []
    for key in titles:
        values = Counter(_frozen(each[key]) for each in columns if key in each)
        value, times = values.most_common(1)[0]
        if key not in NAMES and times > values.total() / 2:
            shared.append((key, value))

    def parts(group: Mapping[str, Any], left_out: Sequence[tuple[str, Any]]) -> list[str]:
        kept = {k: v for k, v in group.items() if (k, _frozen(v)) not in left_out}
        return [show(v) if k in NAMES else f"{titles[k]} {show(v)}" for k, v in kept.items()] or ["all runs"]

    short = [parts(group, shared) for group in columns]
    distinct = len({tuple(each) for each in short}) == len(short)
    return short if distinct else [parts(group, []) for group in columns]


def _key(name: str, runs: Sequence[Run]) -> str:
    """The key that a name means: itself, or the one key that ends with it."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    if name in keys or not runs:
        return name
    endings = [key for key in keys if key.endswith(f".{name}")]
    if len(endings) == 1:
        return endings[0]
    if endings:
        raise UserError(f"--by {name} may be {' or '.join(endings)}; give one of them")
    raise UserError(
        f"--by {name}: no run has this key; give a key of config.yaml, or one of {', '.join(NAMES)}"
    )


def _split(runs: Iterable[Run], key: Callable[[Run], T]) -> dict[T, list[Run]]:
    """The runs by the value of ``key``."""
    parts: dict[T, list[Run]] = {}
    for run in runs:
        parts.setdefault(key(run), []).append(run)
    return parts


def _follows(configs: Sequence[Mapping[str, Any]], key: str, name: str) -> bool:
    """Whether configs with the same choice ``name`` have the same value of ``key``."""
    pairs = {(config.get(name), _frozen(config[key])) for config in configs if key in config}
    return len(pairs) == len({first for first, _ in pairs})


def _is_left_out(key: str, left_out: Sequence[str]) -> bool:
    return key.rpartition(".")[2] == "seed" or any(key == k or key.startswith(f"{k}.") for k in left_out)


def _frozen(value: Any) -> Any:
    """A plain value as one that can be a key of a dictionary."""
    if isinstance(value, Mapping):
        return frozenset((key, _frozen(each)) for key, each in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _order(value: Any) -> tuple[int, Any]:
    """A key to sort values: those that are missing, then numbers, then texts."""
    if value is None:
        return 0, 0
    if isinstance(value, int | float):
        return 1, value
    return 2, str(value)
