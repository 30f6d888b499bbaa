"""Finds a finished run with the same config, for ``skip_completed=true``; imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Keys on which the results of a run do not depend.
IRRELEVANT = (
    "skip_completed", "data_dir", "dataset.data_dir", "callbacks.progress", "trainer.enable_progress_bar",
    "trainer.idle_timeout_s", "trainer.show_schedule",
)  # fmt: skip
RUNS = ("*/*/metrics.json", "multirun/*/*/*/metrics.json")


class Completed(NamedTuple):
    """A finished run: its folder, and the metric that it returned."""

    folder: Path
    monitored: float


def config_hash(plain: Mapping[str, Any]) -> str:
    """A hash that is equal for plain configs that ask for the same results, whatever the order of their keys.

    ``ckpt`` counts for ``mode=test`` only, because a resumed training ends as the uninterrupted one does.
    """
    ignored = {*IRRELEVANT, *(("ckpt",) if plain["mode"] == "fit" else ())}
    text = json.dumps(_relevant(plain, ignored), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def find_completed(plain: Mapping[str, Any], outputs: Path, sweep: Path | None = None) -> Completed | None:
    """The newest finished run with the same `config_hash` under ``outputs`` or in the folder of a sweep.

    Incomplete files, and files of other programs, are ignored.
    """
    wanted, found = config_hash(plain), list[tuple[float, Completed]]()
    for path in {p.resolve() for p in results_below(outputs, sweep)}:
        metrics = _read(path)
        if metrics.get("run/status") == "finished" and metrics.get("run/config_hash") == wanted:
            monitored = metrics.get("run/monitored")
            value = float("nan") if monitored is None else float(monitored)
            found.append((path.stat().st_mtime, Completed(path.parent, value)))
    return max(found)[1] if found else None


def _relevant(node: Any, ignored: Iterable[str], prefix: str = "") -> Any:
    """A plain container without the ``ignored`` keys, and with equal numbers as equal texts."""
    if isinstance(node, Mapping):
        return {
            key: _relevant(value, ignored, f"{prefix}{key}.")
            for key, value in node.items()
            if f"{prefix}{key}" not in ignored
        }
    if isinstance(node, list | tuple):
        return [_relevant(value, ignored, prefix) for value in node]
    if prefix.startswith("trainer.limit_"):
        return node  # 1 is one batch, 1.0 is all of them
    return int(node) if isinstance(node, float) and node.is_integer() else node


def results_below(outputs: Path, sweep: Path | None) -> Iterator[Path]:
    """The files `metrics.json` under ``outputs`` and in the folder of a sweep; a file may be given twice."""
    for pattern in RUNS:
        yield from outputs.glob(pattern)
    if sweep is not None:
        yield from sweep.glob("*/metrics.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return metrics if isinstance(metrics, dict) else {}
