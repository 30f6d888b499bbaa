"""What Lightning, the loader, the callbacks and the logger add: a whole run against a bare PyTorch loop.

All train the same network on the same batches with Adam and validate after every epoch, in turn (A B C A B C ...), in
one process. The whole run is what the command does between the first batch and the end of the training: TensorBoard,
checkpoints, learning-rate log and all. The bare loop has a list of ready batches and nothing else. Between them is
plain Lightning: a module of twenty lines with Lightning's own TensorBoard logger, checkpoints and progress bar.

    python benchmarks/overhead.py experiment=mnist_conv dataset.raw_dir=../shared/data --batches 60
    python benchmarks/overhead.py experiment=ellipse
    python benchmarks/overhead.py experiment=ellipse --tree ../before    # is this source tree as fast as that one?

With --tree both are measured in both source trees in turn, and the ratios between the trees are printed as well.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from timing import by_name, in_turn, ratios, spread
from trees import Tree

# Wall and CPU seconds, and the final validation loss (JSON).
Result = list[float]
WALL, CPU, LOSS = range(3)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of the command, such as experiment=mnist_conv")
    parser.add_argument("--batches", type=int, help="training batches an epoch (default: all)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tree", type=Path, help="another source tree with sglight/, such as a git worktree")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def run_overrides(options: argparse.Namespace) -> list[str]:
    """The command line of the run: the user's, made comparable with the bare loop."""
    limit = [f"trainer.limit_train_batches={options.batches}"] if options.batches else []
    return [
        *options.overrides,
        "strategy=backprop",
        "strategy.scheduler.name=none",
        "strategy.regularisation.smoothness=0",
        f"trainer.max_epochs={options.epochs}",
        f"trainer.threads={options.threads}",
        "trainer.accelerator=cpu",
        "callbacks.figures.enabled=false",
        *limit,
    ]


def measure(options: argparse.Namespace, trees: dict[str, Tree]) -> dict[str, list[Result]]:
    """The results of all rounds by name, which ends in " @tree" for the other source tree."""
    overrides = run_overrides(options)
    runs = {
        f"{kind}{suffix}": partial(tree.call, "overhead_runs:measure", kind, overrides, options.threads)
        for kind in ("whole run", "bare loop")
        for suffix, tree in trees.items()
    }
    runs["plain Lightning"] = partial(
        trees[""].call, "overhead_runs:measure", "plain Lightning", overrides, options.threads
    )
    return by_name(in_turn(runs, options.rounds, warm_up=1))


def compared(runs: dict[str, list[Result]], a: str, b: str, column: int) -> list[float]:
    """Ratios of two runs, round by round."""
    return ratios((r[column] for r in runs[a]), (r[column] for r in runs[b]))


def text(values: list[float]) -> str:
    """Median and range."""
    s = spread(values)
    return f"median {s['median']:.3f}, {s['min']:.3f} to {s['max']:.3f}"


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    options = arguments()
    with ExitStack() as stack:
        trees = {"": stack.enter_context(Tree())}
        if options.tree:
            other = stack.enter_context(Tree(options.tree))
            trees[f" @{other.name}"] = other
        runs = measure(options, trees)
        show(options, trees, runs, trees[""].call("machine:summary"))


def show(
    options: argparse.Namespace, trees: dict[str, Tree], runs: dict[str, list[Result]], machine: str
) -> None:
    """Print the medians and ratios, and write them to --json."""
    summary = {
        name: {
            "wall_s": median(r[WALL] for r in results),
            "cpu_s": median(r[CPU] for r in results),
            "val_loss": results[-1][LOSS],
        }
        for name, results in runs.items()
    }
    print(f"\n{' '.join(options.overrides)}, {options.rounds} rounds, {options.threads} thread(s)")
    print(machine)
    for suffix, tree in trees.items():
        if len(trees) > 1:
            print(f"{suffix.strip() or 'this tree'}: {tree.version()}")
    width = max(map(len, runs))
    for name, row in summary.items():
        times = f"{row['wall_s']:8.3f} s wall, {row['cpu_s']:8.3f} s CPU"
        print(f"{name:>{width + 1}}: {times}, validation loss {row['val_loss']:.4f}")
    found: dict[str, Any] = {"runs": runs, "summary": summary}
    pairs = [(f"whole run{suffix}", f"bare loop{suffix}") for suffix in trees]
    pairs += [("plain Lightning", "bare loop"), ("whole run", "plain Lightning")]
    for (a, b), (column, name) in product(pairs, ((WALL, "wall"), (CPU, "CPU"))):
        found[f"{a} / {b}, {name}"] = compared(runs, a, b, column)
        print(f"{a} / {b}, {name} times: {text(found[f'{a} / {b}, {name}'])}")
    for suffix in (suffix for suffix in trees if suffix):
        for kind in ("whole run", "bare loop"):
            for column, name in ((WALL, "wall"), (CPU, "CPU")):
                values = compared(runs, f"{kind}{suffix}", kind, column)
                found[f"{kind}, {name},{suffix} / this tree"] = values
                print(f"{kind}, {name} times,{suffix} / this tree: {text(values)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
