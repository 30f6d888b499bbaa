"""What a run says in the terminal: what it is about to do, and what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from typing_extensions import override

from sglight.commandline import tensorboard
from sglight.config.machine import cores
from sglight.networks import NetworkSpec
from sglight.strategies.advice import advise
from sglight.strategies.staged import StagedModule

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
# Of the table of stages: headers, and what stands beneath them.
HEADERS = {
    "stage": "stage", "worker": "worker", "steps": "steps", "h": "h", "parameters": "parameters",
    "mult. /\nsample": "cost", "share": "share", "estimator's\nparameters": "estimator",
}  # fmt: skip
NARROW, SPARED = 76, ("h", "mult. /\nsample")
PROFILE = "profile"  # how the file of a profiler's table ends
IDEAL, MEASURED = "speedup/theoretical", "speedup/backprop"
BRIEF = ("test/acc", "time/fit_s", MEASURED)
UNMEASURED = (
    "Speed-up over backprop: not measured, for want of a run of strategy=backprop with the same data and network under "
    "outputs."
)
TIMES = ((86400, "days"), (3600, "h"), (60, "min"), (1, "s"))


class Summary(Callback):
    """Prints `print_summary` once, when the network is built and before it is trained or tested; and refinements.

    Args:
        folder: the run's.
        schedule: whether to print who does what when, too. brief: print nothing.

    Attributes:
        parameters: how many each part of the network has, at worker 0, as it was when a training or test began.
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
        # Counted again for the test: the network may have been refined.
        self.parameters = all_parameter_counts(module)
        held = module.placement.peers.gather(module.placement.own)
        if not self._printed and not self.brief and trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            print_summary(module, self.parameters, held, data, trainer, self.folder)
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
    """`StagedModule.parameter_counts` of all workers, at worker 0; every worker must ask."""
    counts: dict[str, int] = {}
    for own in module.placement.peers.gather(module.parameter_counts()):
        counts |= own
    return counts


def print_summary(
    module: StagedModule,
    parameters: Mapping[str, int],
    held: Sequence[range],
    datamodule: Any,
    trainer: pl.Trainer,
    folder: Path,
) -> None:
    """Before the run: data, network, stages, training, device, folder; ``parameters`` by part.

    Args:
        held: the stages that each worker holds.
    """
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(module, datamodule, trainer).items():
        facts.add_row(name, escape(text))
    console = Console()
    console.print(facts)
    console.print(_stage_table(module, parameters, held, narrow=console.width < NARROW))
    if warning := _oversized(parameters):
        console.print(warning, style="yellow")
    _print_line(console, "folder", str(folder))


def print_results(metrics: Mapping[str, Any], folder: Path, has_events: bool) -> None:
    """After the run: the figures that matter, where everything is, and how to look at it."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("result")
    table.add_column("", justify="right")
    for key, (name, show) in _RESULTS.items():
        if metrics.get(key) is not None:
            table.add_row(name, show(metrics[key]))
    if metrics.get(IDEAL) is not None:
        workers = int(metrics["run/workers"] if metrics["run/workers"] > 1 else metrics["run/stages"])
        table.add_row(
            "ideal speed-up over itself on one worker", f"{metrics[IDEAL]:.2f} by {workers} workers"
        )
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
    """The same as a line, of one of many runs."""
    figures = [
        f"{name} {show(metrics[key])}"
        for key, (name, show) in _RESULTS.items()
        if key in BRIEF and metrics.get(key) is not None
    ]
    print(f"{folder.name}: {', '.join(figures)}")


def count(number: float) -> str:
    """1234567 as ``1.23 M``."""
    for size, unit in UNITS:
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.4g}"


def seconds(time: float) -> str:
    """A time with its unit."""
    if time < 1:
        return f"{time * 1e3:.3g} ms"
    size, unit = next((size, unit) for size, unit in TIMES if time >= 2 * size or size == 1)
    return f"{time / size:.3g} {unit}"


def _print_line(console: Console, name: str, text: str) -> None:
    """A line that is there to be copied: it is not wrapped."""
    console.print(f"{name:<12} {text}", soft_wrap=True, highlight=False, markup=False)


def _facts(module: StagedModule, datamodule: Any, trainer: pl.Trainer) -> dict[str, str]:
    spec, device = module.spec, trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    sizes = f"{datamodule.train_size} training, {datamodule.val_size} validation, {datamodule.test_size} test samples"
    shape = " x ".join(map(str, spec.shape))
    data = f"{datamodule.name}: {sizes} of shape {shape}, {spec.classes} classes, batches of {datamodule.batch_size}"
    return {
        "data": "\n".join([data, *getattr(datamodule, "notes", [])]),
        "network": _network(spec),
        "strategy": module.describe(),
        "advice": advise(spec, datamodule.batch_size, cores()),
        "device": f"{name}, {torch.get_num_threads()} thread(s), precision {trainer.precision}, seed {spec.seed}",
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
    module: StagedModule, parameters: Mapping[str, int], held: Sequence[range], narrow: bool = False
) -> Table:
    """A line a stage, and one for all; a narrow terminal has no room for step sizes and multiplications."""
    spec, costs = module.spec, module.spec.step_costs()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0) if narrow else (0, 1))
    shown = [header for header in HEADERS if not (narrow and header in SPARED)]
    for header in shown:
        table.add_column(header, justify="right", no_wrap=True)

    def add(style: str = "", **cells: str) -> None:
        table.add_row(*(cells.get(HEADERS[header], "") for header in shown), style=style)

    for i, (start, stop) in enumerate(pairwise(module.cuts)):
        cost = sum(costs[start:stop])
        add(
            stage=str(i),
            worker=", ".join(str(rank) for rank, own in enumerate(held) if i in own),
            steps=f"{start + 1}-{stop}",
            h=", ".join(sorted({f"{h:.3g}" for h in spec.step_sizes()[start:stop]})),
            parameters=count(parameters[f"stage_{i}"]),
            cost=count(cost),
            share=f"{cost / sum(costs):.0%}",
            estimator=count(parameters[f"estimator_{i}"]) if f"estimator_{i}" in parameters else "-",
        )
    if len(module.cuts) > 2:
        total = sum(number for name, number in parameters.items() if name.startswith("stage_"))
        add(
            "bold", stage="all", worker=str(len(held)), steps=str(spec.total_steps), parameters=count(total),
            cost=count(sum(costs)), share="100%",
        )  # fmt: skip
    return table


def _oversized(parameters: Mapping[str, int]) -> str:
    """A sentence if the estimators are larger than the network that they serve."""
    network, estimators = (
        sum(number for name, number in parameters.items() if name.startswith(part))
        for part in ("stage_", "estimator_")
    )
    if estimators <= network:
        return ""
    return (
        f"The estimators have {count(estimators)} parameters, the network {count(network)}: they are what is mostly "
        "trained. A smaller strategy.estimator.hidden, another strategy.estimator.name, or fewer stages help."
    )


_RESULTS = {
    "test/acc": ("test accuracy", "{:.2%}".format),
    "test/loss": ("test loss", "{:.4f}".format),
    "val/acc": ("validation accuracy, best epoch", "{:.2%}".format),
    "time/fit_s": ("training", seconds),
    "time/epoch_s": ("an epoch", seconds),
    "throughput/samples_per_s": ("samples a second", count),
    MEASURED: ("speed-up over backprop, measured", "{:.2f}".format),
    "memory/peak_bytes": ("memory that it took", lambda value: decimal(int(value))),
    "model/parameters": ("parameters", count),
}
