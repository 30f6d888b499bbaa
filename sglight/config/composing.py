"""Composes and checks the config of a run before torch is imported.

Registers the schemas with Hydra, makes paths absolute and calls all checks. `CONF` is the folder of the YAML files:
`sglight/conf` in an installed wheel, `conf` beside the package in a checkout.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time_ns
from typing import Any, cast, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import Container, DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from sglight.archive import check_whole, read_record
from sglight.compat.hydra import config_groups, hide_schemas, set_hydra_config, skip_unused_group_lists
from sglight.config import checks
from sglight.config.datasets import SCHEMAS as DATASETS
from sglight.config.effects import check_effects, check_monitors, check_switches
from sglight.config.explanations import explain, unknown_key
from sglight.config.finding import absolute, resolve_ckpt, with_record
from sglight.config.machine import check_devices
from sglight.config.resumption import check_same
from sglight.config.room import check_room
from sglight.config.schema import CALLBACKS, STRATEGIES, Config, default_estimator
from sglight.errors import UserError
from sglight.status import FILE, Contents, beside, locked, read

_PACKAGE = Path(__file__).resolve().parent.parent
CONF = next(
    (d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if (d / "config.yaml").is_file()),
    _PACKAGE / "conf",
)
# Keys whose values are part of the folder names of the jobs of a sweep.
VARIED = ("dataset.", "model.", "strategy.", "trainer.devices", "trainer.replicas", "trainer.precision")
LONGEST_NAME = 100
PATHS = ("data_dir", "predict.input", "dataset.raw_dir", "dataset.archive", "dataset.path")


def register() -> None:
    """Register the schemas with Hydra under the names in the `defaults` of the files in `conf/`."""
    store = ConfigStore.instance().store
    store(name="base_config", node=Config)
    for name, dataset in DATASETS.items():
        store(group="dataset", name=name, node=dataset)
    for name, strategy in STRATEGIES.items():
        store(group="strategy", name=name, node=strategy)
    store(group="callbacks", name="base_callbacks", node={key: node() for key, node in CALLBACKS.items()})
    hide_schemas("base_")
    skip_unused_group_lists()
    OmegaConf.register_new_resolver("sglight_groups", _list_groups, replace=True)
    OmegaConf.register_new_resolver(
        "sglight_estimator", lambda kernel: str(default_estimator(kernel)), replace=True
    )
    OmegaConf.register_new_resolver("sglight_varied", _varied, replace=True)


def to_plain(node: Container) -> dict[str, Any]:
    """`node` as plain dictionaries and lists, with interpolations resolved and enums as their lower-case names."""
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True, enum_to_str=True))


def check(cfg: DictConfig) -> DictConfig:
    """Check a config; returns a copy of it with absolute paths. It may be checked again.

    Relative paths start at the directory in which the command was started. `ckpt=last` becomes the path of that
    checkpoint, and the values of the checkpoint's config replace those that the command line does not give.

    Raises:
        UserError: a sentence about the first key that is wrong.
    """
    cfg = deepcopy(cfg)
    _check_complete(cfg)
    _check_keys(cfg, "")
    cfg.ckpt = resolve_ckpt(cfg.ckpt if cfg.mode == "fit" else _best(cfg.ckpt), cfg)
    deployed = cfg.mode in checks.DEPLOYMENT  # these modes take everything from the checkpoint
    if cfg.ckpt is not None and Path(cfg.ckpt).is_file() and not deployed:
        cfg = with_record(cfg)
    for key in PATHS:
        if (value := OmegaConf.select(cfg, key)) is not None:
            try:
                OmegaConf.update(cfg, key, absolute(key, value))
            except UserError:
                if key != "data_dir" or "data_dir" in cfg.dataset:  # otherwise it is not used
                    raise
    checks.check_targets(cfg)
    checks.check_nodes(cfg)
    checks.check_values(cfg)
    checks.check_model(cfg.model)
    check_room(cfg)
    checks.check_strategy(cfg)
    checks.check_fit(cfg)
    checks.check_trainer(cfg.trainer)
    check_devices(cfg.trainer)
    checks.check_workers(cfg)
    check_monitors(cfg)
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    check_switches(cfg, overrides)
    check_effects(cfg, [override.lstrip("+").partition("=")[0] for override in overrides])
    checks.check_files(cfg)
    if cfg.ckpt is not None:
        check_whole(Path(cfg.ckpt), f"ckpt={cfg.ckpt}")
        if not deployed and (record := read_record(Path(cfg.ckpt), f"ckpt={cfg.ckpt}")):
            check_same(record["config"], to_plain(cfg), f"ckpt={cfg.ckpt}")
    return cfg


def _best(ckpt: str | None) -> str | None:
    """The best checkpoint if `ckpt` is the folder of a run that has one, else `ckpt`."""
    best = None if ckpt is None else Path(absolute("ckpt", ckpt), "checkpoints", "best.ckpt")
    return str(best) if best is not None and best.is_file() else ckpt


def check_settings(given: Mapping[str, Any], schema: type) -> None:
    """Check the keys of a ``strategy`` whose config has no schema, as far as ``schema`` has keys of that name.

    Sections that are null count as left out.

    Raises:
        UserError: about the first value that is wrong.
    """
    names = {field.name for field in fields(schema)}
    known = {key: value for key, value in given.items() if key in names}
    try:
        cfg = OmegaConf.merge(
            {"strategy": OmegaConf.structured(schema)}, {"strategy": _sections(known, schema, "strategy")}
        )
    except OmegaConfBaseException as error:
        raise UserError(explain(error, CONF)) from error
    assert isinstance(cfg, DictConfig)
    checks.check_values(cfg)
    checks.check_loss(cfg)


def _sections(given: Mapping[str, Any], schema: type, prefix: str) -> dict[str, Any]:
    """The keys of a section, without those of its sections that are null."""
    hints, found = get_type_hints(schema), dict(given)
    for key, value in given.items():
        if not is_dataclass(hint := hints.get(key)):
            continue
        assert isinstance(hint, type)
        if value is None:
            del found[key]
        elif isinstance(value, Mapping):
            found[key] = _sections(value, hint, f"{prefix}.{key}")
        else:
            keys = ", ".join(f"{prefix}.{key}.{field.name}" for field in fields(hint))
            raise UserError(f"{prefix}.{key}={value} is not allowed; set its keys instead: {keys}")
    return found


# By run folder: what earlier runs have left there before the run of this process, see `sglight.status.beside`.
EARLIER: dict[Path, Contents] = {}
# The folders of those jobs of a sweep that have diverged.
DIVERGED: list[str] = []
# The folders of the sweeps that this process has started.
SWEEPS: list[Path] = []


class CheckFirst(Callback):
    """Checks the config of a single run before its folder is made, so that a mistake leaves an older run untouched.

    After a sweep it collects the jobs that have diverged, from their files, because jobs may run in other processes.
    """

    _began_ns = 0

    @override
    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        cfg = deepcopy(config)
        for node in (cfg, cfg.hydra):
            OmegaConf.set_struct(node, False)
            OmegaConf.set_readonly(node, False)
        set_hydra_config(cfg)  # the name of the folder is interpolated from it
        try:
            with read_write(cfg.hydra):
                cfg.hydra.runtime.output_dir = cfg.hydra.run.dir
            set_hydra_config(cfg)
            run = cfg.pop("hydra").run
            self._check(config, cfg, Path(absolute("hydra.run.dir", run.dir)))
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
        except OmegaConfBaseException as error:  # Hydra would only print a warning
            raise SystemExit(f"error: {explain(error, CONF)}") from None

    def _check(self, config: DictConfig, cfg: DictConfig, folder: Path) -> None:
        checked = check(cfg)
        for name in (".", ".hydra", "checkpoints"):
            check_writable("hydra.run.dir", folder, name)
        if folder.is_dir():
            with locked(folder):
                EARLIER[folder.resolve()] = beside(folder)
        if checked.ckpt is not None:
            _name_after_checkpoint(config, read_record(Path(checked.ckpt), f"ckpt={checked.ckpt}"))

    @override
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Collect the jobs that have diverged."""
        for path in sorted(Path(absolute("hydra.sweep.dir", config.hydra.sweep.dir)).rglob(FILE)):
            if path.stat().st_mtime_ns >= self._began_ns and read(path.parent).get("status") == "diverged":
                DIVERGED.append(str(path.parent))

    @override
    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a folder that cannot be written to."""
        self._began_ns = time_ns()
        folder = Path(absolute("hydra.sweep.dir", config.hydra.sweep.dir))
        try:
            check_writable("hydra.sweep.dir", folder)
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
        SWEEPS.append(folder)


def check_writable(key: str, folder: Path, name: str = ".") -> None:
    """Refuse a folder that cannot be made or written to.

    Args:
        key: that names the folder.
        folder: to be written to.
        name: of a folder in it that is the one to check.
    """
    path = folder / name
    try:
        existing = next(path for path in (path, *path.parents) if path.exists() or path.is_symlink())
    except OSError as error:
        raise UserError(f"{key}={folder}: {error.strerror}; give another {key}") from error
    if not existing.is_dir():
        what = "not a folder" if existing.exists() else "a broken link"
        raise UserError(f"{key}={folder}: {existing} is {what}; remove it, or give another {key}")
    try:
        TemporaryDirectory(dir=existing).cleanup()  # /proc, for one, says that it can be written to
    except OSError as error:
        raise UserError(
            f"{key}={folder}: {existing} cannot be written to ({error.strerror}); give another {key}"
        ) from error


def _name_after_checkpoint(config: DictConfig, record: dict[str, Any]) -> None:
    """Let the name of the run folder have the checkpoint's seed and choices, unless the command line gives them."""
    given = {override.partition("=")[0] for override in HydraConfig.get().overrides.task}
    if record and "seed" not in given:
        config.seed = record["config"]["seed"]
    for group, choice in record.get("choices", {}).items():
        if group not in given:
            with read_write(config.hydra), open_dict(config.hydra):
                config.hydra.runtime.choices[group] = choice


def _check_complete(cfg: DictConfig) -> None:
    """Refuse keys without a value and interpolations of keys that do not exist."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        to_plain(cfg)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, CONF)) from error
    if missing:
        raise UserError(f"{missing[0]} has no value; give one with {missing[0]}=...")


def _check_keys(node: DictConfig, prefix: str) -> None:
    """Refuse keys that the schema does not have, which Hydra accepts when they are written as `+key=`."""
    schema = OmegaConf.get_type(node)
    known = {field.name for field in fields(schema)} if is_dataclass(schema) else None
    for key in map(str, node):
        if known is not None and key not in known:
            raise UserError(unknown_key(f"{prefix}{key}", node, CONF, known))
        if isinstance(child := node[key], DictConfig):
            _check_keys(child, f"{prefix}{key}.")


def _varied() -> str:
    """The part of a job's folder name that shows which keys the command line sets.

    For ``strategy.lag=2 model.channels=[8,8]`` it is ``-lag_2-channels_8x8``, without characters that would have to be
    quoted in ``ckpt=PATH``. Values that are paths are left out.
    """
    parts = []
    for each in HydraConfig.get().overrides.task:
        key, _, value = each.partition("=")
        if key.startswith(VARIED) and "/" not in value:
            parts.append(f"-{key.rpartition('.')[2]}_{value.replace(',', 'x')}")
    return re.sub(r"[^\w.-]", "", "".join(parts))[:LONGEST_NAME]


def _list_groups() -> str:
    """The groups and their choices in all config folders, for the help text."""
    return "\n".join(
        f"  {group:<12}{', '.join(sorted(names))}"
        for group, names in sorted(config_groups().items())
        if names
    )


register()
