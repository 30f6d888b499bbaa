"""How long each strategy trains until it is as accurate as backpropagation, against the best backpropagation there is.

    python benchmarks/time_to_accuracy.py --raw-dir ../shared/data --json deep_dense.json --picture deep_dense.png
    python benchmarks/time_to_accuracy.py deep_conv --only backprop-2t ddp multilevel-delayed --seeds 1

All contenders train the network of one preset (conf/experiment) on the same training set for the same number of epochs,
with equally many validations, and take turns (A B C, A B C ... by seed), each time in new processes. The target is the
mean final validation accuracy of ``backprop`` less ``--below`` points, or what ``--target`` says. Seconds count from
the first batch, with validations, until the validation in which the target is first reached. ``backprop`` has one
thread, ``backprop-2t`` and ``multilevel-2t`` have two; ``ddp`` is PyTorch's `DistributedDataParallel` on two processes,
in a plain loop without Lightning, its advantage; all others have two workers with one thread each. The ratio is a
contender's seconds over those of the best backpropagation (of the first three), by seed, then the median. The shallower
networks of ``multilevel`` count as well; "at full depth" has the seconds if only the network of the preset counts. The
test set is not used.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from statistics import mean, median, stdev
from time import perf_counter, process_time
from typing import Any

from processes import in_processes
from rich.console import Console
from rich.table import Table

from sglight.parallel.launcher import launch

ONE = ["strategy=backprop"]
LEVELS = ["strategy=multilevel", "strategy.stages=2"]  # how many, and how long: conf/experiment/tuned
# By name: overrides, workers, threads of each.
CONTENDERS: dict[str, tuple[list[str], int, int]] = {
    "backprop": (ONE, 1, 1),
    "backprop-2t": (ONE, 1, 2),
    "ddp": (ONE, 2, 1),
    "1f1b": (["strategy=backprop", "strategy.stages=2"], 2, 1),
    "dni": (["strategy=dni", "strategy.stages=2"], 2, 1),
    "delayed": (["strategy=delayed", "strategy.stages=2"], 2, 1),
    "multilevel": ([*LEVELS, "strategy.level.mode=exact"], 2, 1),
    "multilevel-2t": (
        [
            "strategy=multilevel",
            "strategy.stages=1",
            "strategy.level.mode=exact",
            "strategy.level.microbatches=1",
        ],
        1,
        2,
    ),
    "multilevel-delayed": (LEVELS, 2, 1),
}
BEST = ("backprop", "backprop-2t", "ddp")
Curve = list[tuple[float, float]]


def compose(preset: str, overrides: list[str]) -> dict[str, Any]:
    """The config of a run, in plain containers."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    from sglight.config.composing import CONF, to_plain

    with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="sglight"):
        return to_plain(hydra_compose("config", overrides=[f"experiment={preset}", *overrides]))


def train(plain: dict[str, Any], validations: int, workers: int, threads: int, folder: str) -> None:
    """Train in this process, one of ``workers``; its curve and CPU seconds go to ``folder/RANK.json``."""
    import pytorch_lightning as pl
    import torch

    from sglight.experiment import build_datamodule, build_module, set_up
    from sglight.parallel.environment import environment
    from sglight.parallel.strategy import StageStrategy

    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.curve: Curve = []
            self.steps: list[int] = []

        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.started, self.cpu = perf_counter(), process_time()

        def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.curve.append((perf_counter() - self.started, float(trainer.callback_metrics["val/acc"])))
            self.steps.append(module.plan.spec.total_steps)  # type: ignore[union-attr]

        def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            self.cpu = process_time() - self.cpu

    set_up(plain)
    torch.set_num_threads(threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rank = 0 if (place := environment()) is None else place.global_rank()
    datamodule = build_datamodule(plain, inputs=rank == 0)
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu", devices=workers, strategy=StageStrategy() if workers > 1 else "auto",
        max_epochs=plain["trainer"]["max_epochs"], logger=False, callbacks=[clock],
        limit_train_batches=plain["trainer"]["limit_train_batches"], val_check_interval=1 / validations,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(build_module(plain, datamodule), datamodule)
    shallow = sum(steps < clock.steps[-1] for steps in clock.steps)
    found = {"curve": clock.curve, "cpu_s": clock.cpu, "shallow": shallow}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def data_parallel(plain: dict[str, Any], validations: int) -> dict[str, Any]:
    """The same by `DistributedDataParallel`, each process with half of every batch."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    from sglight.experiment import build_datamodule, build_module, set_up
    from sglight.networks import StableNet
    from sglight.strategies.optim import EpochLR, Length, make_optimizer, make_scheduler

    set_up(plain)
    rank, size = dist.get_rank(), dist.get_world_size()
    datamodule = build_datamodule(plain)
    plan = build_module(plain, datamodule).plan
    net = DistributedDataParallel(StableNet(**vars(plan.spec)))
    loader, epochs = datamodule.train_dataloader(), plain["trainer"]["max_epochs"]
    limit = plain["trainer"]["limit_train_batches"] or 1.0
    batches = min(limit, len(loader)) if isinstance(limit, int) else int(limit * len(loader))
    optimizer = make_optimizer(plan.optimizer, net.parameters())
    scheduler = make_scheduler(plan.scheduler, optimizer, Length(epochs, batches, None))
    assert isinstance(scheduler, EpochLR)
    every, curve = int(batches / validations), Curve()

    @torch.no_grad()
    def accuracy() -> float:
        right = count = 0
        for x, y in datamodule.val_dataloader():
            mine, labels = x.tensor_split(size)[rank], y.tensor_split(size)[rank]
            right += int((net.module(mine).argmax(1) == labels).sum())
            count += len(labels)
        both = torch.tensor([right, count])
        dist.all_reduce(both)
        return float(both[0] / both[1])

    started, cpu = perf_counter(), process_time()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for n, (x, y) in enumerate(loader, 1):
            if n > batches:
                break
            optimizer.zero_grad()
            mine, labels = x.tensor_split(size)[rank], y.tensor_split(size)[rank]
            # The mean over processes that DDP takes becomes the mean over the batch.
            (F.cross_entropy(net(mine), labels, reduction="sum") * (size / len(y))).backward()
            optimizer.step()
            scheduler.step()
            if n % every == 0:
                curve.append((perf_counter() - started, accuracy()))
        scheduler.end_epoch()
    return {"curve": curve, "cpu_s": process_time() - cpu}


def measure(name: str, plain: dict[str, Any], validations: int) -> dict[str, Any]:
    """One training: its curve, and the CPU seconds of each worker."""
    _, workers, threads = CONTENDERS[name]
    if name == "ddp":
        found = in_processes(workers, threads, data_parallel, plain, validations)
    else:
        with tempfile.TemporaryDirectory() as folder:
            task = (train, plain, validations, workers, threads, folder)
            if workers == 1:
                in_processes(1, threads, *task)
            else:
                launch(*task, workers=workers, threads=threads)
            found = [json.loads(Path(folder, f"{i}.json").read_text()) for i in range(workers)]
    shallow = found[0].get("shallow", 0)  # so many validations are of shallower networks
    return {"curve": found[0]["curve"], "cpu_s": [one["cpu_s"] for one in found], "shallow": shallow}


def seconds_to(curve: Curve, target: float) -> float | None:
    """When an accuracy is first reached; None for never."""
    return next((seconds for seconds, accuracy in curve if accuracy >= target), None)


def summarise(runs: list[dict[str, Any]], below: float, target: float | None) -> dict[str, Any]:
    """The target, and of each contender its accuracies, seconds and ratios."""
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["name"], {})[run["seed"]] = run
    if target is None:
        target = mean(run["curve"][-1][1] for run in by_name["backprop"].values()) - below / 100
    reached = {
        name: {seed: seconds_to(run["curve"], target) for seed, run in of.items()}
        for name, of in by_name.items()
    }
    best = {
        seed: min((s for n in BEST if (s := reached.get(n, {}).get(seed)) is not None), default=None)
        for seed in sorted({run["seed"] for run in runs})
    }
    found: dict[str, Any] = {"target": target, "contenders": {}}
    for name, of in by_name.items():
        final = [run["curve"][-1][1] for run in of.values()]
        seconds = [reached[name][seed] for seed in of]
        ratios = [s / b for seed in of if (s := reached[name][seed]) is not None and (b := best[seed])]
        deep = {seed: seconds_to(run["curve"][run["shallow"] :], target) for seed, run in of.items()}
        deep_ratios = [s / b for seed in of if (s := deep[seed]) is not None and (b := best[seed])]
        found["contenders"][name] = {
            "final": mean(final), "final_std": stdev(final) if len(final) > 1 else 0.0, "seconds": seconds,
            "ratio": median(ratios) if len(ratios) == len(of) else None, "ratios": ratios, "seeds": list(of),
            "deep_seconds": list(deep.values()), "deep_ratios": deep_ratios,
            "deep_ratio": median(deep_ratios) if len(deep_ratios) == len(of) else None,
            "total_s": median(run["curve"][-1][0] for run in of.values()),
            "cpu_s": [median(times) for times in zip(*(run["cpu_s"] for run in of.values()), strict=True)],
        }  # fmt: skip
    return found


def show(preset: str, found: dict[str, Any]) -> None:
    """The summary as a table."""
    table = Table(title=f"{preset}: seconds to {found['target']:.2%} of the validation data")
    for column in (
        "",
        "final accuracy",
        "seconds by seed",
        "over the best backprop",
        "at full depth",
        "whole training",
        "CPU by worker",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for name, one in found["contenders"].items():
        seconds = ", ".join("never" if s is None else f"{s:.1f}" for s in one["seconds"])
        ratio, deep = ("" if one[key] is None else f"{one[key]:.2f}" for key in ("ratio", "deep_ratio"))
        cpu = " + ".join(f"{s:.0f}" for s in one["cpu_s"])
        final = f"{one['final']:.2%} ± {100 * one['final_std']:.2f}"
        table.add_row(name, final, seconds, ratio, deep, f"{one['total_s']:.1f} s", f"{cpu} s")
    Console(width=110).print(table)


def draw(preset: str, runs: list[dict[str, Any]], target: float, path: Path) -> None:
    """Accuracy over seconds: the median curve over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in CONTENDERS:
        curves = [run["curve"] for run in runs if run["name"] == name]
        if curves:
            points = [
                [median(values) for values in zip(*point, strict=True)] for point in zip(*curves, strict=True)
            ]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.axhline(target, color="grey", linestyle=":", label="target")
    axes.set(xlabel="seconds of training", ylabel="validation accuracy", title=f"{preset}, 2 cores")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 2 * target - 1 - 0.05))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("preset", nargs="?", default="deep_dense")
    add("overrides", nargs="*", help="of the preset, for all contenders, as trainer.max_epochs=2")
    add("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help=f"of {', '.join(CONTENDERS)}")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--validations", type=int, default=4, help="in an epoch")
    add("--below", type=float, default=0.3, help="points that the target is below backprop's final accuracy")
    add("--target", type=float, help="accuracy to reach, as 0.9764; backprop is then left out unless named")
    add("--raw-dir", type=Path, help="dataset.raw_dir")
    add("--json", type=Path)
    add("--picture", type=Path)
    options = parser.parse_args()
    always = ["backprop"] if options.target is None else []
    names = [name for name in CONTENDERS if not options.only or name in [*always, *options.only]]
    shared = [] if options.raw_dir is None else [f"dataset.raw_dir={options.raw_dir.resolve()}"]
    runs: list[dict[str, Any]] = []
    for seed in options.seeds:
        for name in names:
            overrides = [*CONTENDERS[name][0], *shared, *options.overrides, f"seed={seed}"]
            run = measure(name, compose(options.preset, overrides), options.validations)
            runs.append({"name": name, "seed": seed, **run})
            seconds, accuracy = run["curve"][-1]
            print(f"seed {seed}, {name}: {accuracy:.2%} after {seconds:.1f} s", flush=True)
            if options.json:
                options.json.write_text(json.dumps({"preset": options.preset, "runs": runs}, indent=1))
    found = summarise(runs, options.below, options.target)
    show(options.preset, found)
    if options.json:
        text = {"preset": options.preset, "command": vars(options), "summary": found, "runs": runs}
        options.json.write_text(json.dumps(text, indent=1, default=str))
    if options.picture:
        draw(options.preset, runs, found["target"], options.picture)
    print(f"load at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
