"""Two stages on two workers against one, against backpropagation, and against PyTorch's own ways to use two processes.

    python benchmarks/stages.py --json stages.json       # everything, both networks: about 25 minutes
    python benchmarks/stages.py --network conv --only dni-1 dni-2-lag1 1f1b --rounds 3
    python benchmarks/stages.py --profile                # what the stages and their parts cost, for every cut
    python benchmarks/stages.py --tree ../before --only dni-2-lag1 backprop   # is this tree as fast as that one?

All methods train the same network from the same initial values on the same batches and take turns (A B C A B C ...),
each time in new processes with one thread each (--threads). ``dni-W-lagD`` and ``backprop`` run through Lightning's
Trainer as a user's run does, but for logger, checkpoints and bar; what they stand against are plain loops without
Lightning (`baselines.py`), which favours the latter. The pipelines get the stages of the DNI cut (--pipeline-cut), and
the number of microbatches that is best in a sweep beforehand.

``replicas-2`` is backpropagation with trainer.replicas=2, our data parallelism; ``delayed-1x2`` has both stages in each
of two replicas, where ``delayed-m2`` has one on each of two workers.

Wall time is that of the process which needs longest for the measured batches, between batches in full swing: neither
the filling nor the draining of queues counts. It is wall_with_ends_ms in the JSON from the first start to the last end.
CPU time is each process's own; "by CPU" is dni-1's over that of the busiest process: the speed-up if nobody waited,
which other programs disturb least. Ratios are taken within a round, then the median over rounds. The losses of all
methods with true gradients have to agree, and those of dni-1 and dni-W-lag1 have to be the same.

With --tree every method is measured twice in a round, with sglight of this source tree and with that of the other, and
a further table has the ratios of wall and CPU time between the two.

Environment variables reach all processes. On Linux, glibc gives large tensors back to the system and fetches them
again in every batch, at the price of page faults; MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ stop that. Set
them for --tree: otherwise page faults differ by a factor of three between runs of one commit (conv, backprop).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from cases import CASES, has_mnist
from comparison import MEASUREMENT_S, compare
from result_tables import show_comparison, show_costs
from trees import Tree


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=(*CASES, "both"), default="both")
    add("--rounds", type=int, help="default: 7 (--profile: 30)")
    add("--batches", type=int, help=f"measured at once (default: about {MEASUREMENT_S:.0f} s)")
    add(
        "--only",
        nargs="+",
        metavar="METHOD",
        help="such as dni-1 dni-2-lag1 bare ddp gpipe 1f1b (default: all)",
    )
    add("--workers", nargs="+", type=int, default=[1, 2], help="of dni (default: 1 2)")
    add("--lags", nargs="+", type=int, default=[0, 1, 2], help="of dni on several workers (default: 0 1 2)")
    add("--stages", type=int, help="of dni (default: the most workers, at least 2)")
    add(
        "--threads",
        type=int,
        default=1,
        help="of each process, but of those with -2t, which have twice as many",
    )
    add("--pipeline-cut", type=int, help="steps of the pipelines' first stage (default: those of dni)")
    add("--diagnose", type=int, default=0, help="strategy.diagnose_every_n_batches (default: 0, never)")
    add("--raw-dir", type=Path, default=Path("../shared/data"), help="has MNIST/raw/*; else random numbers")
    add("--profile", action="store_true", help="measure the parts of the stages instead")
    add("--around", type=int, default=3, help="cuts on either side of the chosen one (--profile)")
    add(
        "--tree", type=Path, help="another source tree with sglight/, such as a git worktree, to compare with"
    )
    add("--json", type=Path)
    options = parser.parse_args()
    if options.profile and options.tree:
        parser.error("--profile measures this source tree only: leave --tree out")
    return options


def main() -> None:
    """Measure, print tables, and write JSON if asked to."""
    options = arguments()
    # For the processes of the trees, and for those that they start. Threads that wait shall not spin.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with ExitStack() as stack:
        this = stack.enter_context(Tree())
        other = stack.enter_context(Tree(options.tree)) if options.tree else None
        run(options, this, other)


def run(options: argparse.Namespace, this: Tree, other: Tree | None) -> None:
    """Measure every network."""
    facts, data = this.call("machine:facts"), "MNIST" if has_mnist(options.raw_dir) else "random numbers"
    print(*(f"{key} {value}" for key, value in facts.items()), f"data {data}", sep=", ")
    results: dict[str, Any] = {"machine": facts, "data": data, "options": vars(options), "networks": {}}
    if other:
        results["trees"] = {"this": this.version(), other.name: other.version()}
        print(f"this tree: {this.version()}; @{other.name}: {other.version()}")
    for network in (name for name in CASES if options.network in (name, "both")):
        batch = CASES[network].batch
        if options.profile:
            found = this.call("stage_costs:profile", network, vars(options))
            show_costs(network, batch, found)
        else:
            found = compare(network, options, this, other, partial(print, file=sys.stderr, flush=True))
            show_comparison(network, batch, found, f"@{other.name}" if other else "")
        results["networks"][network] = found
        results["load_at_the_end"] = os.getloadavg()[0]
        if options.json:
            options.json.write_text(json.dumps(results, indent=2, default=str))
    print(f"load at the end {results['load_at_the_end']:.2f}")


if __name__ == "__main__":
    main()
