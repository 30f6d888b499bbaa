"""Which keys may change when a run is resumed from a checkpoint, and the hash of a resumed run; imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from sglight.archive import read_record
from sglight.config.completed import config_hash
from sglight.config.schema import Config
from sglight.errors import UserError

# Keys and whole sections that may differ between a checkpoint and the training that resumes from it.
RATES = ("lr", "weight_decay", "momentum", "nesterov", "betas", "delay_momentum")
SCHEDULE = ("warmup_epochs", "step_epochs", "gamma", "patience", "min_factor")
FREE = (
    "mode", "ckpt", "skip_completed", "data_dir", "trainer", "callbacks", "logger", "dataset.data_dir",
    "dataset.raw_dir", "dataset.archive", "dataset.path", "dataset.download", "dataset.memory_limit",
    "dataset.eval_batch_size", "strategy.clip_norm", "strategy.diagnose_every_n_batches", "strategy.level.epochs",
    "strategy.level.lr", "strategy.level.estimator_lr", "strategy.target_accuracy", "strategy.min_decrease",
    "strategy.chunk_samples", "strategy.cuts", "strategy.balance", *(f"strategy.optimizer.{key}" for key in RATES),
    *(f"strategy.{part}.optimizer.{key}" for part in ("estimator", "head") for key in RATES),
    *(f"strategy.scheduler.{key}" for key in SCHEDULE),
)  # fmt: skip
# The same for mode=test: network and data must be the same, which is checked against the contents of the checkpoint.
FREE_TO_TEST = (
    *FREE, "model", "strategy", "dataset.batch_size", "dataset.test_points", "dataset.augment",
    "dataset.crop_padding", "dataset.flip",
)  # fmt: skip
# Keys that a test takes from its checkpoint.
TESTED = ("seed", "dataset", "model", "strategy", "trainer.precision")
# Keys that a training does not take from its checkpoint.
OWN = ("mode", "ckpt", "skip_completed", "data_dir", "dataset.data_dir")
PRESETS = ("experiment", "debug")
CHOSEN = {"dataset.name": "dataset", "model.dynamics": "model"}  # keys that the choice of their group sets


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], name: str) -> None:
    """Refuse a config that differs from a checkpoint's in a key that may not change.

    Args:
        saved: the plain config in the checkpoint.
        now: the present plain config.
        name: of the checkpoint, for the message.

    Raises:
        UserError: about the first key that differs.
    """
    for key, before, value in conflicts(saved, now):
        given = f"{CHOSEN[key]}= or {key}=" if key in CHOSEN else key
        raise UserError(
            f"{name} was trained with {key}={before}, not {value}; leave {given} out or give it that value, or begin a "
            "run of its own without ckpt"
        )


def conflicts(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The keys that differ but may not: (key, value in the checkpoint, present value)."""
    if now["mode"] == "fit" and _target(saved, "strategy") != _target(now, "strategy"):
        yield "strategy", _target(saved, "strategy"), _target(now, "strategy")
    free = FREE if now["mode"] == "fit" else FREE_TO_TEST
    before, after = flat(saved), flat(now)
    for key in sorted(before, key=lambda key: key.endswith("_target_")):  # other keys first: they say more
        if key in after and not is_in(key, free) and before[key] != after[key]:
            yield key, before[key], after[key]


def inherited(
    saved: Mapping[str, Any], now: Mapping[str, Any], overrides: Iterable[str], derived: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The checkpoint's config with the values of the command line, and the keys that the command line gives.

    Args:
        saved: the plain config in the checkpoint.
        now: the present plain config.
        overrides: the command line, such as ``seed=2``. If it has a preset, all keys of ``now`` count as given, but not
            the seed where it is the default.
        derived: the keys of ``now`` that take their value from another key, such as ``dataset.seed``; they are not
            given with their section.
    """
    given = [override.lstrip("+~").partition("=")[0].partition("@")[0] for override in overrides]
    if any(key in PRESETS or key.partition("/")[0] in PRESETS for key in given):
        mixed = deepcopy(dict(now))
        if "seed" not in given and now["seed"] == Config.seed:
            for key in {"seed", "dataset.seed"} & {"seed", *derived}:
                _set(mixed, key, _get(saved, key))
        return mixed, list(now)
    if "trainer.replicas" in given:  # which are the devices where nobody says otherwise
        given.append("trainer.devices")
    own = [*given, *OWN]
    mixed = deepcopy(dict(now))
    if now["mode"] == "fit":
        _take(mixed, saved, own)
    else:
        tested = {key: value for key, value in flat(saved).items() if is_in(key, TESTED)}
        for section in ("dataset", "model", "strategy"):
            if section not in given:
                mixed[section] = deepcopy(saved[section])
                for key in (k for k in given if k.startswith(f"{section}.")):
                    _set(mixed, key, _get(now, key))
        for key in ("seed", "trainer.precision"):
            if key not in given and key in tested:
                _set(mixed, key, tested[key])
    free, flat_saved = FREE if now["mode"] == "fit" else FREE_TO_TEST, flat(saved)
    for key in derived:
        if key in flat_saved and key not in given and not is_in(key, free):
            _set(mixed, key, flat_saved[key])
    return mixed, given


def run_hash(plain: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """A hash that is equal for runs with the same results, resumed or not.

    It is the `config_hash` of a run that is not resumed, or is the continuation of a run with the same config.

    Args:
        plain: the plain config.
        record: what the checkpoint contains about its run; empty if there is no checkpoint.
    """
    plain = _asked(plain)
    clean = config_hash(plain)
    if plain["mode"] != "fit" or not record:
        return clean
    before = _asked(record["config"]) | {"mode": "fit", "ckpt": None}
    first = record.get("hash") == config_hash(before)
    if not _depends_on_length(before):
        for key in ("max_epochs", "max_steps", "max_time"):
            before["trainer"][key] = plain["trainer"][key]
    before["trainer"]["max_time"] = plain["trainer"]["max_time"]
    if first and config_hash(before) == clean:
        return clean
    return hashlib.blake2b(f"{record.get('hash')} {clean}".encode(), digest_size=16).hexdigest()


def record_of(ckpt: str | None) -> dict[str, Any]:
    """What a checkpoint contains about its run; empty if there is no checkpoint."""
    return {} if ckpt is None else read_record(Path(ckpt), f"ckpt={ckpt}")


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a plain config by dotted key.

    >>> flat({"model": {"steps": 8}, "seed": 1})
    {'model.steps': 8, 'seed': 1}
    """
    found: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def is_in(key: str, sections: Iterable[str]) -> bool:
    """Whether a dotted key is one of ``sections``, or lies in one of them."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _asked(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config as the user wrote it: without cuts that were measured."""
    asked = deepcopy(dict(plain))
    if asked["strategy"].get("balance") == "measured":
        asked["strategy"]["cuts"] = None
    return asked


def _depends_on_length(plain: Mapping[str, Any]) -> bool:
    """Whether the first epochs of a training depend on how many there are in all."""
    strategy = plain["strategy"]
    if (strategy.get("scheduler") or {}).get("name") == "cosine":
        return True
    epochs = (strategy.get("level") or {}).get("epochs")
    fixed = isinstance(epochs, list) and None not in epochs[:-1]
    return "levels" in strategy and strategy["levels"] != 1 and not fixed


def _target(plain: Mapping[str, Any], group: str) -> str:
    return str(plain[group].get("_target_")).rpartition(".")[2].lower()


def _take(mixed: dict[str, Any], saved: Mapping[str, Any], own: Iterable[str], prefix: str = "") -> None:
    """Replace the values in ``mixed`` by those in ``saved``, except under the keys ``own``."""
    own = list(own)
    for key, value in saved.items():
        path = f"{prefix}{key}"
        if is_in(path, own):
            continue
        kept = [name for name in own if name.startswith(f"{path}.")]
        if isinstance(value, Mapping) and isinstance(mixed.get(key), Mapping) and kept:
            below = {
                k: v for k, v in mixed[key].items() if is_in(f"{path}.{k}", kept) or _above(path, k, kept)
            }
            _take(below, value, own, f"{path}.")
            mixed[key] = below
        else:
            mixed[key] = deepcopy(value)


def _above(path: str, key: str, kept: Iterable[str]) -> bool:
    return any(name.startswith(f"{path}.{key}.") for name in kept)


def _get(plain: Mapping[str, Any], key: str) -> Any:
    node: Any = plain
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _set(plain: dict[str, Any], key: str, value: Any) -> None:
    *path, name = key.split(".")
    for part in path:
        plain = plain.setdefault(part, {})
    plain[name] = value
