"""Late gradients in many stages behind a short exact training of a shallower network: what of that is needed?

    python benchmarks/warm_start.py --raw-dir ../shared/data --json warm_start.json
    python benchmarks/warm_start.py --only "late, M = 8" "exact" --seeds 1

All variants train the network of ``experiment=warm_start`` for equally many epochs, each in a process with one thread.
Accuracies are of the last weights; the validation set is what to choose by. No time is measured.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from processes import in_processes
from rich.console import Console
from rich.table import Table
from time_to_accuracy import compose

LATE = "strategy.level.mode=[exact,delayed]"
EXACT = "strategy.level.mode=exact"
DEEPER = ("model.steps=32",)  # sixteen stages need sixteen coarse steps
SGD = ("strategy.optimizer.name=sgd", "strategy.optimizer.lr=0.1")


@dataclass(frozen=True)
class Variant:
    """A training.

    Attributes:
        overrides: of ``experiment=warm_start``.
        kept: which of Adam's moments the refinement keeps where the program cannot say so: ``first`` or ``second``.
    """

    overrides: tuple[str, ...]
    kept: str | None = None


VARIANTS = {
    "backprop": Variant(("strategy=backprop",)),
    "late from the start, M = 8": Variant(("strategy=delayed",)),
    "exact": Variant((EXACT,)),
    "late, M = 2": Variant((LATE, "strategy.stages=2")),
    "late, M = 4": Variant((LATE, "strategy.stages=4")),
    "late, M = 8": Variant((LATE,)),
    "late, M = 8, slack 1": Variant((LATE, "strategy.slack=1")),
    "late, M = 8, both moments kept": Variant((LATE, "strategy.moments=prolong")),
    "late, M = 8, first moment kept": Variant((LATE, "strategy.moments=prolong"), "first"),
    "late, M = 8, second moment kept": Variant((LATE, "strategy.moments=prolong"), "second"),
    "exact, fresh moments": Variant((EXACT, "strategy.moments=reset")),
    "exact, 2 coarse epochs": Variant((EXACT, "strategy.level.epochs=[2,6]")),
    "late, M = 8, 2 coarse epochs": Variant((LATE, "strategy.level.epochs=[2,6]")),
    "exact, 1 coarse epoch": Variant((EXACT, "strategy.level.epochs=[1,7]")),
    "late, M = 8, 1 coarse epoch": Variant((LATE, "strategy.level.epochs=[1,7]")),
    "exact, fine rate 3e-4": Variant((EXACT, "strategy.level.lr=[0.001,0.0003]")),
    "late, M = 8, fine rate 3e-4": Variant((LATE, "strategy.level.lr=[0.001,0.0003]")),
    "exact, fine rate 3e-3": Variant((EXACT, "strategy.level.lr=[0.001,0.003]")),
    "late, M = 8, fine rate 3e-3": Variant((LATE, "strategy.level.lr=[0.001,0.003]")),
    "backprop, 32 steps": Variant(("strategy=backprop", *DEEPER)),
    "exact, 32 steps": Variant((EXACT, *DEEPER)),
    "late, M = 16, 32 steps": Variant((LATE, "strategy.stages=16", *DEEPER)),
    "backprop, sgd": Variant(("strategy=backprop", *SGD)),
    "late from the start, M = 8, sgd": Variant(("strategy=delayed", *SGD)),
    "exact, sgd": Variant((EXACT, *SGD)),
    "late, M = 8, sgd": Variant((LATE, *SGD)),
    "late, M = 8, sgd, momentum kept": Variant((LATE, "strategy.moments=prolong", *SGD)),
}


def train(plain: dict[str, Any], kept: str | None) -> dict[str, float]:
    """Validation and test accuracy of the last weights."""
    import pytorch_lightning as pl
    import torch

    from sglight.experiment import build_datamodule, build_module, set_up

    class Keep(pl.Callback):
        """Forgets one of the moments when a level begins."""

        def __init__(self) -> None:
            self.level = 0

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if kept and module.level != self.level:
                self.level = module.level
                for optimizer in trainer.strategy.optimizers:
                    for state in optimizer.state.values():
                        if kept == "second":
                            state["exp_avg"].zero_()
                        else:
                            # The corrections for a start at zero begin anew with the count of steps, for both moments.
                            state["exp_avg"].mul_(0.1)
                            state["exp_avg_sq"].zero_()
                            state["step"].zero_()

    set_up(plain)
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = build_datamodule(plain)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=plain["trainer"]["max_epochs"], logger=False, callbacks=[Keep()],
        limit_train_batches=plain["trainer"]["limit_train_batches"], num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    module = build_module(plain, data)
    trainer.fit(module, data)
    found = {"val": float(trainer.callback_metrics["val/acc"])}
    return {**found, "test": float(trainer.test(module, data, verbose=False)[0]["test/acc"])}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", help="of the preset, for all variants, as trainer.limit_train_batches=0.1")
    add("--only", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of {'; '.join(VARIANTS)}")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--at-once", type=int, default=1, help="trainings at a time")
    add("--raw-dir", type=Path, help="dataset.raw_dir")
    add("--json", type=Path)
    options = parser.parse_args()
    shared = [] if options.raw_dir is None else [f"dataset.raw_dir={options.raw_dir.resolve()}"]
    names = options.only or list(VARIANTS)
    tasks = [
        (
            seed,
            name,
            compose("warm_start", [*VARIANTS[name].overrides, *shared, *options.overrides, f"seed={seed}"]),
        )
        for seed in options.seeds
        for name in names
    ]
    runs: list[dict[str, Any]] = []

    def one(seed: int, name: str, plain: dict[str, Any]) -> None:
        found = in_processes(1, 1, train, plain, VARIANTS[name].kept)[0]
        runs.append({"name": name, "seed": seed, **found})
        print(f"seed {seed}, {name}: validation {found['val']:.2%}, test {found['test']:.2%}", flush=True)
        if options.json:
            options.json.write_text(
                json.dumps({"command": vars(options), "runs": runs}, indent=1, default=str)
            )

    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda task: one(*task), tasks))
    table = Table("", "seeds", "validation accuracy", "test accuracy")
    for name in names:
        of = [run for run in runs if run["name"] == name]
        table.add_row(name, str(len(of)), *(spread([run[kind] for run in of]) for kind in ("val", "test")))
    Console(width=110).print(table)


def spread(values: list[float]) -> str:
    """Mean and standard deviation, in percent."""
    return f"{mean(values):.2%} ± {100 * stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2%}"


if __name__ == "__main__":
    main()
