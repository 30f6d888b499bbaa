"""Runs that have been done already, found by what was asked for; imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# What a run finds out does not depend on these.
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
    """A name for what a run does: that of any plain config that asks for the same thing, in whichever order.

    ``ckpt`` counts for ``mode=test`` only: a training that was gone on with ends as the uninterrupted one does.
    """
    ignored = {*IRRELEVANT, *(("ckpt",) if plain["mode"] == "fit" else ())}
    text = json.dumps(_relevant(plain, ignored), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def find_completed(plain: Mapping[str, Any], outputs: Path, sweep: Path | None = None) -> Completed | None:
    """The newest finished run of the same `config_hash` under ``outputs`` or in the folder of a sweep.

    Files that are none of ours, or half-written, are passed over.
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
        return node  # 1 batch, or the part 1.0
    return int(node) if isinstance(node, float) and node.is_integer() else node


def results_below(outputs: Path, sweep: Path | None) -> Iterator[Path]:
    """The `metrics.json` of runs under ``outputs``, and of jobs in the folder of a sweep; some perhaps twice."""
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
