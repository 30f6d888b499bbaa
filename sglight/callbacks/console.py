"""What a run prints to the terminal: a summary before it, and its results after it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typing_extensions import override

from sglight import units
from sglight.commandline import tensorboard
from sglight.config.machine import cores
from sglight.gradients import TrainedEstimator
from sglight.networks import NetworkSpec
from sglight.strategies.advice import advise
from sglight.strategies.staged import StagedModule

# The table of stages: the column of each header.
HEADERS = {
    "stage": "stage", "worker": "worker", "steps": "steps", "h": "h", "parameters": "parameters",
    "mult. /\nsample": "cost", "share": "share", "estimator's\nparameters": "estimator",
}  # fmt: skip
NARROW = 76  # terminals with fewer columns
LEFT_OUT = ("h", "mult. /\nsample")  # columns of the table that are left out there
PROFILE = "profile"  # the end of the name of a profiler's file
IDEAL, MEASURED = "speedup/theoretical", "speedup/backprop"
BRIEF = ("test/acc", "time/fit_s", MEASURED)  # the results in the line about one of many runs
UNMEASURED = (
    "Speed-up over backprop: not measured, because there is no run of strategy=backprop in one stage with the same "
    "data and network under outputs."
)


class Summary(Callback):
    """Calls `print_summary` once, before the training or the test, and prints a line at each refinement.

    Args:
        folder: of the run.
        schedule: whether to print the schedule of the workers as well.
        brief: whether to leave out the summary.

    Attributes:
        parameters: at worker 0, the number of parameters of each part of the network at the start of the last training
            or test.
    """

    def __init__(self, folder: Path, schedule: bool = False, brief: bool = False) -> None:
        self.folder, self.schedule, self.brief = folder, schedule, brief
        self.parameters: dict[str, int] = {}
        self._printed = False
        self._level = 0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print(trainer, pl_module)

    def _print(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, StagedModule)
        # Counted again before the test, because the network may have been refined.
        self.parameters = all_parameter_counts(module)
        stages_by_worker = module.placement.peers.gather(module.placement.own)
        if not self._printed and not self.brief and trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            print_summary(module, self.parameters, stages_by_worker, data, trainer, self.folder)
            if self.schedule:
                print(module.schedule(module.placement.pipeline.size, module.placement.replicas.size))
        self._printed, self._level = True, module.level

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, StagedModule)
        if pl_module.level != self._level:
            self._level = pl_module.level
            if trainer.is_global_zero:
                print(f"epoch {trainer.current_epoch}: refined to {_network(pl_module.spec)}")


def all_parameter_counts(module: StagedModule) -> dict[str, int]:
    """`StagedModule.parameter_counts` of all workers, at worker 0; every worker must call it."""
    counts: dict[str, int] = {}
    for own in module.placement.peers.gather(module.parameter_counts()):
        counts |= own
    return counts


def print_summary(
    module: StagedModule,
    parameters: Mapping[str, int],
    stages_by_worker: Sequence[range],
    datamodule: Any,
    trainer: pl.Trainer,
    folder: Path,
) -> None:
    """Prints what a run is about to do: data, network, strategy, device, a table of the stages, and the folder.

    Args:
        module: the strategy, with its network.
        parameters: the number of parameters of each part.
        stages_by_worker: the stages that each worker has, by rank.
        datamodule: the data.
        trainer: of the run.
        folder: of the run.
    """
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(module, datamodule, trainer).items():
        facts.add_row(name, escape(text))
    console = Console()
    console.print(facts)
    console.print(_stage_table(module, parameters, stages_by_worker, narrow=console.width < NARROW))
    if warning := _oversized(parameters, _section(module)):
        console.print(warning, style="yellow")
    _print_line(console, "folder", str(folder))


def print_results(metrics: Mapping[str, Any], folder: Path, has_events: bool) -> None:
    """Prints the most important results of a run, its folder, and the command that starts TensorBoard."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("result")
    table.add_column("", justify="right")
    for key, (name, show) in _RESULTS.items():
        if metrics.get(key) is not None:
            table.add_row(name, show(metrics[key]))
    if metrics.get(IDEAL) is not None:
        workers = int(metrics["run/workers"] if metrics["run/workers"] > 1 else metrics["run/stages"])
        ideal = f"{units.ratio(metrics[IDEAL])} by {workers} workers"
        table.add_row("ideal speed-up over itself on one worker", ideal)
    console = Console()
    console.print(table)
    if MEASURED in metrics and metrics[MEASURED] is None:
        console.print(UNMEASURED, highlight=False)
    if "test/loss" in metrics and metrics["test/loss"] is None:
        console.print(
            "the loss is not finite: lower strategy.optimizer.lr or model.horizon", style="bold red"
        )
    _print_line(console, "folder", str(folder))
    for path in sorted(folder.glob(f"*-{PROFILE}.txt")):
        _print_line(console, "profile", str(path))
    if has_events:
        _print_line(console, "TensorBoard", f"{tensorboard()} --logdir {shlex.quote(str(folder))}")


def print_result(metrics: Mapping[str, Any], folder: Path, has_events: bool) -> None:
    """Prints the results of one of many runs in one line."""
    figures = [
        f"{name} {show(metrics[key])}"
        for key, (name, show) in _RESULTS.items()
        if key in BRIEF and metrics.get(key) is not None
    ]
    print(f"{folder.name}: {', '.join(figures)}")


def _print_line(console: Console, name: str, text: str) -> None:
    """Prints a line that is meant to be copied, without wrapping it."""
    console.print(f"{name:<12} {text}", soft_wrap=True, highlight=False, markup=False)


def _facts(module: StagedModule, datamodule: Any, trainer: pl.Trainer) -> dict[str, str]:
    spec, device = module.spec, trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    sizes = f"{datamodule.train_size} training, {datamodule.val_size} validation, {datamodule.test_size} test samples"
    threads = units.plural(torch.get_num_threads(), "thread")
    shape = " x ".join(map(str, spec.shape))
    data = f"{datamodule.name}: {sizes} of shape {shape}, {spec.classes} classes, batches of {datamodule.batch_size}"
    trains = trainer.state.fn == TrainerFn.FITTING
    return {
        "data": "\n".join([data, *getattr(datamodule, "notes", [])]),
        "network": _network(spec),
        "strategy": module.describe(),
        **({"advice": advise(spec, datamodule.batch_size, cores())} if trains else {}),
        "device": f"{name}, {threads}, precision {trainer.precision}, seed {spec.seed}",
    }


def _network(spec: NetworkSpec) -> str:
    segments = "; ".join(
        f"{s.steps} steps of size {s.step_size:.3g} (T = {s.horizon:g}), width {' x '.join(map(str, shape))}"
        for s, shape in zip(spec.segments, spec.segment_shapes, strict=True)
    )
    extras = [f"{spec.normalisation} normalisation"] if spec.normalisation != "none" else []
    extras += ["reversible"] if spec.reversible else []
    return f"{spec.dynamics}, {spec.kernel}, {spec.activation}: {', '.join([segments, *extras])}"


def _stage_table(
    module: StagedModule,
    parameters: Mapping[str, int],
    stages_by_worker: Sequence[range],
    narrow: bool = False,
) -> Table:
    """The table of stages: a row for each, and one for all of them; ``narrow`` leaves out some columns."""
    spec, costs = module.spec, module.spec.step_costs()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0) if narrow else (0, 1))
    shown = [header for header in HEADERS if not (narrow and header in LEFT_OUT)]
    for header in shown:
        table.add_column(header, justify="right", no_wrap=True)

    def add(style: str = "", **cells: str) -> None:
        table.add_row(*(cells.get(HEADERS[header], "") for header in shown), style=style)

    for i, (start, stop) in enumerate(pairwise(module.cuts)):
        cost = sum(costs[start:stop])
        add(
            stage=str(i),
            worker=", ".join(str(rank) for rank, own in enumerate(stages_by_worker) if i in own),
            steps=f"{start + 1}-{stop}" if stop > start + 1 else str(stop),
            h=", ".join(sorted({f"{h:.3g}" for h in spec.step_sizes()[start:stop]})),
            parameters=units.count(parameters[f"stage_{i}"]),
            cost=units.count(cost),
            share=units.share(cost / sum(costs)),
            estimator=units.count(parameters[f"estimator_{i}"]) if f"estimator_{i}" in parameters else "-",
        )
    if len(module.cuts) > 2:
        total = sum(number for name, number in parameters.items() if name.startswith("stage_"))
        add(
            "bold", stage="all", worker=str(len(stages_by_worker)), steps=str(spec.total_steps),
            parameters=units.count(total), cost=units.count(sum(costs)), share=units.share(1),
        )  # fmt: skip
    return table


def _section(module: StagedModule) -> str:
    """The config section of what gives gradients at the boundaries of this worker: ``head`` or ``estimator``."""
    kinds = {
        e.optimizer_key.split(".")[1] for e in module.estimators.values() if isinstance(e, TrainedEstimator)
    }
    return "head" if "head" in kinds else "estimator"


def _oversized(parameters: Mapping[str, int], section: str) -> str:
    """A warning if what the config section describes has more parameters than the network; else an empty text."""
    network, estimators = (
        sum(number for name, number in parameters.items() if name.startswith(part))
        for part in ("stage_", "estimator_")
    )
    if estimators <= network:
        return ""
    return (
        f"The {section}s have {units.count(estimators)} parameters, more than the network's {units.count(network)}. "
        f"Use a smaller strategy.{section}.hidden, another strategy.{section}.name, or fewer stages."
    )


_RESULTS = {
    "test/acc": ("test accuracy", units.percent),
    "test/loss": ("test loss", "{:.4f}".format),
    "val/acc": ("validation accuracy, best epoch", units.percent),
    "time/fit_s": ("training", units.seconds),
    "time/epoch_s": ("an epoch", units.seconds),
    "throughput/samples_per_s": ("samples a second", units.count),
    MEASURED: ("speed-up over backprop, measured", units.ratio),
    "memory/peak_bytes": ("peak memory", units.size),
    "model/parameters": ("parameters", units.count),
}
