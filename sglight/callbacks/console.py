"""What a run says in the terminal: what it is about to do, and what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
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

from sglight.networks import NetworkSpec
from sglight.strategies.base import StagedModule

UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


class Summary(Callback):
    """Prints `print_summary` once, when the network is built and before it is trained or tested.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._printed = False

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print(trainer, pl_module)

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._print(trainer, pl_module)

    def _print(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self._printed and trainer.is_global_zero:
            assert isinstance(module, StagedModule)
            print_summary(module, trainer.datamodule, trainer, self.folder)  # type: ignore[attr-defined]
        self._printed = True


def print_summary(module: StagedModule, datamodule: Any, trainer: pl.Trainer, folder: Path) -> None:
    """Before the run: data, network, stages, training, device, folder."""
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, text in _facts(module, datamodule, trainer).items():
        facts.add_row(name, escape(text))
    console = Console()
    console.print(facts)
    console.print(_stage_table(module))
    _print_line(console, "folder", str(folder))


def print_results(metrics: Mapping[str, Any], folder: Path, tensorboard: bool) -> None:
    """After the run: the figures that matter, where everything is, and how to look at it."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("result")
    table.add_column("", justify="right")
    for key, (name, show) in _RESULTS.items():
        if metrics.get(key) is not None:
            table.add_row(name, show(metrics[key]))
    console = Console()
    console.print(table)
    if "test/loss" in metrics and metrics["test/loss"] is None:
        console.print(
            "the loss is not finite: lower strategy.optimizer.lr or model.horizon", style="bold red"
        )
    _print_line(console, "folder", str(folder))
    if tensorboard:
        _print_line(console, "TensorBoard", f"tensorboard --logdir {shlex.quote(str(folder))}")


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
    return f"{time:.3g} s" if time < 120 else f"{time / 60:.3g} min"


def _print_line(console: Console, name: str, text: str) -> None:
    """A line that is there to be copied: it is not wrapped."""
    console.print(f"{name:<12} {text}", soft_wrap=True, highlight=False, markup=False)


def _facts(module: StagedModule, datamodule: Any, trainer: pl.Trainer) -> dict[str, str]:
    spec, device = module.spec, trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    sizes = f"{datamodule.train_size} training, {datamodule.val_size} validation, {datamodule.test_size} test samples"
    shape = " x ".join(map(str, spec.shape))
    return {
        "data": f"{datamodule.name}: {sizes} of shape {shape}, {spec.classes} classes, "
        f"batches of {datamodule.batch_size}",
        "network": _network(spec),
        "strategy": module.describe(),
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


def _stage_table(module: StagedModule) -> Table:
    spec, costs = module.spec, module.spec.step_costs()
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("stage", justify="right")
    for header in ("steps", "h", "parameters", "mult. / sample", "share", "estimator's parameters"):
        table.add_column(header, justify="right")
    for i, stage in module.own_stages():
        sizes = sorted({f"{s.step_size:.3g}" for s in stage.segments.values()})
        cost = sum(costs[stage.start : stage.stop])
        table.add_row(
            str(i),
            f"{stage.start + 1}-{stage.stop}",
            ", ".join(sizes),
            count(sum(p.numel() for p in stage.parameters())),
            count(cost),
            f"{cost / sum(costs):.0%}",
            count(module.estimator_parameters(i)) if module.estimator_parameters(i) else "-",
        )
    if len(module.cuts) > 2:
        total = sum(p.numel() for p in module.stages.parameters())
        table.add_row(
            "all", str(spec.total_steps), "", count(total), count(sum(costs)), "100%", "", style="bold"
        )
    return table


_RESULTS = {
    "test/acc": ("test accuracy", "{:.2%}".format),
    "test/loss": ("test loss", "{:.4f}".format),
    "val/acc": ("validation accuracy, best epoch", "{:.2%}".format),
    "time/fit_s": ("training", seconds),
    "time/epoch_s": ("an epoch", seconds),
    "throughput/samples_per_s": ("samples a second", count),
    "speedup/theoretical": ("theoretical speed-up, a worker a stage", "{:.2f}".format),
    "memory/peak_bytes": ("peak memory", lambda value: decimal(int(value))),
    "model/parameters": ("parameters", count),
}
