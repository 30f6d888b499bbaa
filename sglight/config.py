"""The config of a run: its schemas in Hydra's ConfigStore, what is checked before torch is imported, its paths.

`CONF` is the folder of the YAML files: `sglight/conf` in an installed wheel, `conf` beside the package in a checkout.
"""

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.experimental.callback import Callback
from hydra.utils import to_absolute_path
from omegaconf import Container, DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from sglight import checks
from sglight.data.schema import SCHEMAS as DATASETS
from sglight.errors import UserError
from sglight.explain import explain, unknown_key
from sglight.schema import STRATEGIES, Config

_PACKAGE = Path(__file__).resolve().parent
CONF = next(
    (d for d in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if (d / "config.yaml").is_file()),
    _PACKAGE / "conf",
)
# Keys whose values tell the jobs of a sweep apart, in the names of their folders.
VARIED = ("dataset.", "model.", "strategy.", "trainer.devices", "trainer.precision")
LONGEST_NAME = 100
PATHS = ("data_dir", "dataset.raw_dir", "dataset.archive", "dataset.path")


def register() -> None:
    """Make the schemas known to Hydra under the names that the files in `conf/` begin with."""
    store = ConfigStore.instance().store
    store(name="base_config", node=Config)
    for name, dataset in DATASETS.items():
        store(group="dataset", name=name, node=dataset)
    for name, strategy in STRATEGIES.items():
        store(group="strategy", name=name, node=strategy)
    OmegaConf.register_new_resolver("sglight_groups", _list_groups, replace=True)
    OmegaConf.register_new_resolver("sglight_varied", _varied, replace=True)


def to_plain(node: Container) -> dict[str, Any]:
    """`node` as plain containers, resolved, its enums as their lower-case names."""
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True, enum_to_str=True))


def check(cfg: DictConfig) -> DictConfig:
    """`cfg` with absolute paths, once its keys are known and go together; checking twice does no harm.

    Relative paths count from the directory in which the command was started. `ckpt=last` becomes the path that it
    stands for.

    Raises:
        UserError: a sentence about the first key that is wrong.
    """
    cfg = deepcopy(cfg)
    _check_complete(cfg)
    _check_keys(cfg, "")
    for key in PATHS:
        if (value := OmegaConf.select(cfg, key)) is not None:
            OmegaConf.update(cfg, key, _absolute(value))
    checks.check_targets(cfg)
    checks.check_values(cfg)
    checks.check_model(cfg.model)
    checks.check_strategy(cfg)
    checks.check_trainer(cfg.trainer)
    checks.check_workers(cfg)
    cfg.ckpt = resolve_ckpt(cfg.ckpt)
    checks.check_files(cfg)
    return cfg


def check_settings(given: Mapping[str, Any], schema: type) -> None:
    """Refuse keys of ``strategy``, from a config without a schema, whose values ``schema`` would refuse.

    Keys that it does not have are the strategy's own, and sections that are null have its defaults.
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
    """The keys of a section, without sections in it that are null."""
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


def resolve_ckpt(ckpt: str | None) -> str | None:
    """The absolute path of the checkpoint that `ckpt` stands for.

    `last` is the run folder's own `checkpoints/last.ckpt` if there is one (the same `hydra.run.dir` again),
    otherwise the newest of a run of the same dataset, model and strategy under `outputs`. A run's folder stands for
    its last checkpoint.
    """
    if ckpt is None:
        return None
    if ckpt != "last":
        path = Path(_absolute(ckpt))
        return str(path / "checkpoints" / "last.ckpt" if path.is_dir() else path)
    if not HydraConfig.initialized():
        raise UserError("ckpt=last is known to the command only; give the path of a checkpoint")
    hydra = HydraConfig.get()
    own = Path(_absolute(hydra.runtime.output_dir), "checkpoints", "last.ckpt")
    if own.is_file():
        return str(own)
    choices = "-".join(hydra.runtime.choices[group] for group in ("dataset", "model", "strategy"))
    found = _last_checkpoints(Path(_absolute("outputs")), choices)
    if newest := max(found, key=lambda path: path.stat().st_mtime, default=None):
        return str(newest)
    raise UserError(
        f"ckpt=last finds no run of {choices} with a checkpoint under outputs/; give the path of one"
    )


class CheckFirst(Callback):
    """Refuses a single run before its folder is made, so that a mistake leaves an older run there as it was."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        cfg = deepcopy(config)
        for node in (cfg, cfg.hydra):
            OmegaConf.set_struct(node, False)
            OmegaConf.set_readonly(node, False)
        HydraConfig.instance().set_config(cfg)  # parts of the folder's name come from there
        with read_write(cfg.hydra):
            cfg.hydra.runtime.output_dir = cfg.hydra.run.dir
        HydraConfig.instance().set_config(cfg)
        cfg.pop("hydra")
        try:
            check(cfg)
        except UserError as error:
            raise SystemExit(f"error: {error}") from None


def _check_complete(cfg: DictConfig) -> None:
    """Refuse keys without a value and interpolations that lead nowhere."""
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        to_plain(cfg)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, CONF)) from error
    if missing:
        raise UserError(f"{missing[0]} has no value; give one with {missing[0]}=...")


def _check_keys(node: DictConfig, prefix: str) -> None:
    """Refuse keys that the schema does not have; `+key=` adds them without a word."""
    schema = OmegaConf.get_type(node)
    known = {field.name for field in fields(schema)} if is_dataclass(schema) else None
    for key in map(str, node):
        if known is not None and key not in known:
            raise UserError(unknown_key(f"{prefix}{key}", node, CONF, known))
        if isinstance(child := node[key], DictConfig):
            _check_keys(child, f"{prefix}{key}.")


def _last_checkpoints(outputs: Path, choices: str) -> Iterator[Path]:
    for folder in (f"*/*-{choices}", f"multirun/*/*/*-{choices}"):
        yield from outputs.glob(f"{folder}/checkpoints/last.ckpt")
        yield from outputs.glob(f"{folder}-seed*/checkpoints/last.ckpt")


def _absolute(path: str) -> str:
    return to_absolute_path(str(Path(path).expanduser()))


def _varied() -> str:
    """What the command line gives a job besides the choices that name its folder, as part of a folder's name.

    ``-lag_2-channels_8x8`` for ``strategy.lag=2 model.channels=[8,8]``: nothing that would have to be quoted in
    ``ckpt=PATH``. Paths are left out.
    """
    parts = []
    for override in HydraConfig.get().overrides.task:
        key, _, value = override.partition("=")
        if key.startswith(VARIED) and "/" not in value:
            parts.append(f"-{key.rpartition('.')[2]}_{value.replace(',', 'x')}")
    return re.sub(r"[^\w.-]", "", "".join(parts))[:LONGEST_NAME]


def _list_groups() -> str:
    """Groups and their choices in all config folders, for the help text; Hydra asks for it whenever it composes."""
    from hydra.core.global_hydra import GlobalHydra

    choices: dict[str, set[str]] = {}
    for source in GlobalHydra.instance().config_loader().get_sources():
        if source.provider == "hydra" or source.scheme() == "structured":
            continue
        for group in source.list("", ObjectType.GROUP):
            choices.setdefault(group, set()).update(source.list(group, ObjectType.CONFIG))
    return "\n".join(
        f"  {group:<12}{', '.join(sorted(names))}" for group, names in sorted(choices.items()) if names
    )


register()
