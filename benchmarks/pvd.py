"""Parallel variable distribution against backpropagation with as many gradient evaluations, on small data sets.

An evaluation is a pass through the training set that gives the gradient of some or all weights. Each row is the
training of a preset and the test of its best epoch; seconds are those of the training, with its validations and
checkpoints, without its start. For every number of processors a row further down is backpropagation for as many epochs
as those processors took evaluations.

    python benchmarks/pvd.py                                  # ellipse, swiss_roll and digits; 1, 2 and 4 processors
    python benchmarks/pvd.py ellipse --workers 2 --rounds 3   # 2 processors in one process and on 2 workers, in turn
    python benchmarks/pvd.py mnist_dense --workers 2 --processors 2 --overrides trainer.max_epochs=2
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from sglight import experiment, process
from sglight.callbacks.timing import EpochTimer
from sglight.config.composing import CONF, check, to_plain
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


def measured(plain: dict[str, Any], folder: Path) -> dict[str, float]:
    """The metrics of a run in this process, or of this worker's part of it."""
    process.set_up(plain)
    torch.set_num_threads(1)
    datamodule = experiment.build_datamodule(plain)
    module = experiment.build_module(plain, datamodule)
    best, callbacks = experiment.build_callbacks(plain["callbacks"], folder)
    timer = EpochTimer()
    trainer = experiment.build_trainer(plain, folder, [*callbacks, timer])
    began = process_time()
    trainer.fit(module, datamodule)
    cpu_s = process_time() - began
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()} | best.best_metrics
    own = {"cpu_s": cpu_s, "fit_s": timer.fit_s, "epochs": float(trainer.current_epoch)}
    trainer.test(module, datamodule, ckpt_path=best.best_model_path, verbose=False, weights_only=True)
    return {**metrics, **own, "test/acc": float(trainer.callback_metrics["test/acc"])}


def row(name: str, *overrides: str) -> dict[str, float]:
    """Do a run, print what came of it, and return its metrics."""
    plain = config(*overrides)
    workers = plain["trainer"]["devices"]
    with tempfile.TemporaryDirectory() as folder:
        run = (measured, plain, Path(folder))
        found: dict[str, float] = (
            launch(*run, workers=workers, threads=1) if workers > 1 else measured(*run[1:])
        )
    found.setdefault("pvd/gradient_evaluations", found["epochs"])
    print(
        f"{name:<34} {found['test/acc']:8.2%} {found['val/acc']:8.2%} {found['epochs']:7.0f} "
        f"{found['pvd/gradient_evaluations']:12.0f} {found['cpu_s']:8.1f} {found['fit_s']:8.1f} "
        f"{found.get('speedup/theoretical', 1):10.2f}",
        flush=True,
    )
    return found


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
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often one process and these workers take turns"
    )
    parser.add_argument("--overrides", nargs="*", default=[], help="of the config, for all runs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"one thread a process, seed {options.seed}; CPU seconds are worker 0's"
    )
    for preset in options.presets:
        print(
            f"\n{preset:<34} {'test':>8} {'val':>8} {'epochs':>7} {'evaluations':>12} {'CPU s':>8} {'wall s':>8} "
            f"{'speed-up':>10}"
        )
        common = (f"experiment={preset}", f"seed={options.seed}", *options.overrides)
        row("backprop, the preset", *common, "strategy=backprop")
        for p in options.processors:
            pvd = (*common, "strategy=pvd", f"strategy.processors={p}")
            ratios = []
            for _ in range(options.rounds if p in options.workers else 1):
                found = row(f"pvd, {p} processor(s)", *pvd)
                if p in options.workers:
                    spread = row(f"  on {p} workers", *pvd, f"trainer.devices={p}")
                    ratios.append(found["fit_s"] / spread["fit_s"])
            if ratios:
                gain = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
                print(f"  wall, one process : {p} workers    {gain}")
            epochs = round(found["pvd/gradient_evaluations"])
            row(
                "  backprop, as many evaluations",
                *common,
                "strategy=backprop",
                f"trainer.max_epochs={epochs}",
            )


if __name__ == "__main__":
    main()
