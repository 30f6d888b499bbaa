"""How long it takes from the start of the command to the first training batch, in a run and in a job of a sweep.

    python benchmarks/first_batch.py experiment=ellipse
    python benchmarks/first_batch.py experiment=mnist_conv dataset.raw_dir=../shared/data --tree ../before

A run is `python -m sglight`, in a new process and a new folder, from the start of Python. A job of a sweep is the
second one of `-m seed=1,2`, from the end of the first. With --tree both are measured in both source trees in turn.
Only times of one process are counted: `trainer.devices=1`. A first round, whose results are left out, converts the
data and compiles all modules into a folder of its own, because some installations keep none that are compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

import machine
from rich.console import Console
from rich.table import Table
from timing import by_name, in_turn, ratios, spread

HERE = Path(__file__).resolve().parent
# One batch of everything, and `first_batch_stamps` notes when it begins and when a job ends.
SHORT = (
    "strategy._target_=first_batch_stamps_training.Backprop",
    "+hydra.callbacks.stamps._target_=first_batch_stamps.Jobs",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=1",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
)
# Wall and CPU seconds.
Times = tuple[float, float]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of the command, such as experiment=mnist_conv")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tree", type=Path, help="another source tree with sglight/, such as a git worktree")
    return parser.parse_args()


def stamps(tree: Path, overrides: list[str], threads: int, data: Path) -> list[tuple[str, float, float]]:
    """What happened in a process of the command: ("batch" or "end", seconds since its start, CPU seconds).

    Raises:
        SystemExit: if the command fails, with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "stamps.jsonl"
        search = os.pathsep.join([str(tree), str(HERE)])
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env |= {"PYTHONPYCACHEPREFIX": str(data.parent / "compiled"), "PYTHONPATH": search}
        env |= {"OMP_NUM_THREADS": str(threads), "STAMPS": str(file)}
        command = [sys.executable, "-m", "sglight", *overrides, f"data_dir={data}", *SHORT]
        start = perf_counter()
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} in {tree}:\n{done.stdout}{done.stderr}")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [(kind, wall - start, cpu) for kind, wall, cpu in lines]


def run(tree: Path, overrides: list[str], threads: int, data: Path) -> Times:
    """From the start of Python to the first batch."""
    (_, wall, cpu), *_ = stamps(tree, overrides, threads, data)
    return wall, cpu


def job(tree: Path, overrides: list[str], threads: int, data: Path) -> Times:
    """From the end of the first job of a sweep to the first batch of the second one."""
    found = stamps(tree, ["-m", "seed=1,2", *overrides], threads, data)
    assert [kind for kind, _, _ in found] == ["batch", "end", "batch", "end"], found
    (_, end, end_cpu), (_, batch, batch_cpu) = found[1:3]
    return batch - end, batch_cpu - end_cpu


def main() -> None:
    """Measure, and print a table."""
    options = arguments()
    overrides = [absolute(override) for override in options.overrides]
    trees = {"this tree": HERE.parent}
    if options.tree:
        trees[options.tree.name] = options.tree.resolve()
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            (kind, name): partial(measure, tree, overrides, options.threads, Path(folder, name))
            for kind, measure in (("a run", run), ("a job of a sweep", job))
            for name, tree in trees.items()
        }
        results = by_name(in_turn(runs, options.rounds, warm_up=1))
    title = f"{' '.join(options.overrides)}, {options.threads} thread(s), {options.rounds} rounds"
    table = Table(title=f"{title}\n{machine.summary()}")
    for column in ("to the first batch of", "source", "wall s", "CPU s", "CPU / that of the other tree"):
        table.add_column(column)
    for (kind, name), times in results.items():
        others = next((r for (k, n), r in results.items() if k == kind and n != name), None)
        ratio = "" if others is None else text(ratios((t[1] for t in times), (t[1] for t in others)))
        table.add_row(kind, name, text([t[0] for t in times]), text([t[1] for t in times]), ratio)
    Console(width=140).print(table)


def absolute(override: str) -> str:
    """An override, with its path from here if it is a relative one, because the command is run elsewhere."""
    key, _, value = override.partition("=")
    return f"{key}={Path(value).resolve()}" if value.startswith(".") else override


def text(values: list[float]) -> str:
    """Median and range."""
    s = spread(values)
    return f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"


if __name__ == "__main__":
    main()
