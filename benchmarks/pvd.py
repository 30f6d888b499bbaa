"""Parallel variable distribution against backpropagation with as many gradient evaluations, on small data sets.

An evaluation is a pass through the training set that gives the gradient of some or all weights. Each row is a whole
run of a preset, the test of its best epoch included; CPU seconds are those of its training, without its start. For
every number of processors the row below is backpropagation for as many epochs as those processors took evaluations.

    python benchmarks/pvd.py                                  # ellipse, swiss_roll and digits; 1, 2 and 4 processors
    python benchmarks/pvd.py ellipse --workers 2              # 2 processors once more, on 2 workers
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from sglight import experiment
from sglight.config import CONF, check, to_plain
from sglight.parallel.launcher import launch

PRESETS = ("ellipse", "swiss_roll", "digits")
QUIET = (
    "trainer.accelerator=cpu", "trainer.threads=1", "logger=none", "callbacks.progress.enabled=false",
    "callbacks.figures.enabled=false", "callbacks.timeline.enabled=false",
)  # fmt: skip


def config(*overrides: str) -> dict[str, Any]:
    """The plain config of that command line."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="sglight"):
        return to_plain(check(compose("config", [*overrides, *QUIET])))


def measured(plain: dict[str, Any], folder: Path) -> float:
    """CPU seconds of a run in this process, or of this worker's part of it."""
    began = process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        experiment.run(plain, folder)
    return process_time() - began


def row(name: str, *overrides: str) -> dict[str, float]:
    """Do a run, print what came of it, and return its metrics."""
    plain = config(*overrides)
    workers = plain["trainer"]["devices"]
    with tempfile.TemporaryDirectory() as folder:
        if workers > 1:
            cpu = launch(measured, plain, Path(folder), workers=workers, threads=1)
        else:
            torch.set_num_threads(1)
            cpu = measured(plain, Path(folder))
        metrics: dict[str, float] = json.loads((Path(folder) / "metrics.json").read_text())
    evaluations = metrics.get("pvd/gradient_evaluations", metrics["run/epochs"])
    print(
        f"{name:<34} {metrics['test/acc']:8.2%} {metrics['val/acc']:8.2%} {metrics['run/epochs']:7.0f} "
        f"{evaluations:12.0f} {cpu:8.1f} {metrics['time/fit_s']:8.1f} {metrics.get('speedup/theoretical', 1):10.2f}",
        flush=True,
    )
    return {**metrics, "evaluations": evaluations}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--processors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[], help="numbers of processors to have on workers too"
    )
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"one thread a process, one run each, seed {options.seed}; CPU seconds are worker 0's"
    )
    for preset in options.presets:
        print(
            f"\n{preset:<34} {'test':>8} {'val':>8} {'epochs':>7} {'evaluations':>12} {'CPU s':>8} {'wall s':>8} "
            f"{'speed-up':>10}"
        )
        common = (f"experiment={preset}", f"seed={options.seed}")
        row("backprop, the preset", *common, "strategy=backprop")
        for p in options.processors:
            pvd = (*common, "strategy=pvd", f"strategy.processors={p}")
            found = row(f"pvd, {p} processor(s)", *pvd)
            if p in options.workers:
                row(f"  on {p} workers", *pvd, f"trainer.devices={p}")
            epochs = round(found["evaluations"])
            row(
                "  backprop, as many evaluations",
                *common,
                "strategy=backprop",
                f"trainer.max_epochs={epochs}",
            )


if __name__ == "__main__":
    main()
