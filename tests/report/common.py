"""Folders as runs leave them, without a training."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

STARTED = 1.7e9
Record = tuple[str, int, float, float]  # tag, step, seconds, value


def config(strategy: str = "backprop", seed: int = 1, **keys: Any) -> dict[str, Any]:
    """A resolved config; ``strategy__stages=2`` sets ``strategy.stages``."""
    whole: dict[str, Any] = {
        "mode": "fit",
        "seed": seed,
        "ckpt": None,
        "data_dir": "/somewhere",
        "dataset": {
            "_target_": "sglight.data.images.DigitsData",
            "name": "digits",
            "seed": seed,
            "batch_size": 64,
        },
        "model": {"dynamics": "hamiltonian", "kernel": "dense", "steps": 8, "channels": [16, 32]},
        "strategy": {"_target_": f"sglight.strategies.{strategy}.{strategy}", "optimizer": {"lr": 0.001}},
        "trainer": {"devices": 1, "num_nodes": 1, "max_epochs": 5},
    }
    for key, value in keys.items():
        node, *path, last = whole, *key.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return whole


def results(acc: float = 0.9, **more: float | None) -> dict[str, Any]:
    """What `metrics.json` has; ``time__fit_s=3`` sets ``time/fit_s``."""
    numbers: dict[str, Any] = {
        "test/acc": acc,
        "test/loss": 0.3,
        "val/acc": acc,
        "time/fit_s": 10.0,
        "time/epoch_s": 2.0,
        "throughput/samples_per_s": 1000.0,
        "memory/peak_bytes": 500_000_000,
        "model/parameters": 38090,
        "run/status": "finished",
    }
    return numbers | {key.replace("__", "/"): value for key, value in more.items()}


def curve(best: float = 0.9, epochs: int = 5, epoch_s: float = 2.0) -> list[Record]:
    """Accuracy that comes near to ``best``, and a loss that falls, ten batches an epoch."""
    records: list[Record] = [("val/acc", 0, -1.0, math.nan), ("lr/stage_0", 0, 0.0, 0.001)]
    for e in range(epochs):
        end = epoch_s * (e + 1)
        records += [
            ("train/loss", 10 * e + i, epoch_s * (e + i / 10), 2.0 * 0.5 ** (e + i / 10))
            for i in range(0, 10, 5)
        ]
        records += [("epoch", 10 * e + i, epoch_s * (e + i / 10), float(e)) for i in range(0, 10, 5)]
        records.append(("val/acc", 10 * e + 9, end, best * (1 - 0.3 * 0.4**e)))
    return records


def write_events(folder: Path, records: Iterable[Record], suffix: str = "") -> Path:
    """A file of events with these scalars."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(folder), filename_suffix=suffix)
    for tag, step, seconds, value in records:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=STARTED + seconds, step=step, summary=summary))
    writer.close()
    return max(folder.glob("events.out.tfevents.*"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def write_run(
    folder: Path,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    records: Iterable[Record] = (),
    choices: Mapping[str, str] | None = None,
    status: Mapping[str, Any] | None = None,
) -> Path:
    """The folder of a run: config, results if it finished, events, Hydra's choices, status."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(settings)))
    if metrics is not None:
        (folder / "metrics.json").write_text(json.dumps(metrics))
    if choices is not None:
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "hydra.yaml").write_text(
            yaml.safe_dump({"hydra": {"runtime": {"choices": dict(choices)}}})
        )
    if status is not None:
        (folder / "status.json").write_text(json.dumps(status))
    if records := list(records):
        write_events(folder, records)
    return folder


def write_sweep(folder: Path, settings: int, seeds: int = 2) -> int:
    """Runs of several strategies, rates and seeds, and some that failed, were tested or tried; returns how many."""
    written = 0
    for i in range(settings):
        strategy, lr = ("backprop", "dni", "delayed", "multilevel")[i % 4], 0.001 * 2 ** (i // 4)
        best = 0.97 - 0.01 * (i % 4) - 0.004 * (i // 4)
        stages = {} if strategy == "backprop" else {"strategy__stages": 4}
        for seed in range(1, seeds + 1):
            settings_of = config(strategy, seed, strategy__optimizer={"lr": lr}, **stages)
            phases = {f"time__stage_{k}__{p}_s": 0.01 for k in range(4) for p in ("forward", "backward")}
            if strategy == "dni":
                phases |= {f"time__stage_{k}__estimate_s": 0.004 for k in range(3)}
            numbers = results(best + seed / 1000, throughput__samples_per_s=1000.0 - 100 * (i % 4), **phases)
            numbers |= {"run/machine": "A CPU, 2 cores", "run/versions": "sglight 1.0, torch 2.9"}
            cosines = [] if strategy == "backprop" else [("stage_0/cosine", 40, 8.0, 0.57 + 0.1 * (i % 4))]
            records = [*curve(best, epochs=12), *cosines]
            write_run(folder / f"{i}-{strategy}-seed{seed}", settings_of, numbers, records)
            written += 1
        if i % 5 == 4:
            failed = {"status": "failed", "reason": "UserError: no"}
            write_run(folder / f"{i}-{strategy}-failed", config(strategy, 9), status=failed)
            debug = {"debug": "limit"}
            write_run(folder / f"{i}-debug", config(strategy), results(0.2), choices=debug)
            ckpt = f"/somewhere/{i}/checkpoints/last.ckpt"
            write_run(folder / f"{i}-test", config(strategy, mode="test", ckpt=ckpt), {"test/acc": best})
            written += 3
    return written
