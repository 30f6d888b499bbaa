"""The time a batch that `python -m sglight.plan` foretells, against the one that is measured.

    python benchmarks/plan.py --network conv

Of late gradients in two stages (two microbatches) on groups x replicas = 1 x 2, 2 x 1 and 2 x 2 workers of one thread,
which share the cores of this machine. In each round a few batches are measured anew in processes by themselves, from
these follow the times that are foretold, and then each split trains. Ratios are within a round, then the median over
rounds.

Bandwidth and latency are those of sums between two processes, measured in each round by the sizes that occur.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from cases import CASES, Case
from contenders import delayed
from fitting import fit
from processes import in_processes
from timing import Length, by_name, in_turn, ratios, spread

from sglight.networks import Stage
from sglight.parallel.launcher import launch
from sglight.planning import Machines, evaluate, stage_seconds

SPLITS = ((1, 2), (2, 1), (2, 2))
TRIES = 30
make = partial(delayed, microbatches=2)


def message_s(size: int) -> float:
    """Typical seconds of a sum of so many floats over the processes of the group."""
    values, times = torch.zeros(size), []
    for _ in range(TRIES):
        begin = perf_counter()
        dist.all_reduce(values)
        times.append(perf_counter() - begin)
    return median(times)


def foretold(case: Case) -> list[float]:
    """Milliseconds a batch of each split, with what messages take here."""
    count = sum(p.numel() for p in Stage(case.spec).parameters())
    short, long = (in_processes(2, 1, message_s, size)[0] for size in (1, count))
    bandwidth = 4 * count / (long - short)  # of two processes each sends all of its values once
    module, found, cores = make(case), [], len(os.sched_getaffinity(0))
    for groups, replicas in SPLITS:
        machines = Machines(groups * replicas, bandwidth, short / 2, cores=cores)
        costs = stage_seconds(module, case.batch, replicas, machines)
        split = evaluate(module.plan, module.groups(groups), replicas, case.batch, costs, machines)
        found.append(1e3 * split.batch_s)
    return found


def measured(case: Case, raw_dir: Path, length: Length, groups: int, replicas: int) -> float:
    """Milliseconds a batch of a training."""
    workers = groups * replicas
    with tempfile.TemporaryDirectory() as folder:
        task = (fit, make, case, raw_dir, length, workers, Path(folder), replicas)
        launch(*task, workers=workers, threads=1)
        times = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(workers)]
    return 1e3 * max(each["end"] - each["start"] for each in times) / length.measured


def compare(network: str, options: argparse.Namespace) -> dict[str, Any]:
    """Foretold and measured times, and their ratios, by split."""
    case, length = CASES[network], Length(options.batches)
    runs: dict[str, Any] = {"foretold": partial(foretold, case)}
    for split in SPLITS:
        runs["{} x {}".format(*split)] = partial(measured, case, options.raw_dir, length, *split)
    found = by_name(in_turn(runs, options.rounds))
    result = {}
    for k, name in enumerate(list(runs)[1:]):
        said = [each[k] for each in found["foretold"]]
        result[name] = {
            "foretold_ms": spread(said),
            "measured_ms": spread(found[name]),
            "ratio": spread(ratios(said, found[name])),
        }
    return result


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=CASES, default="conv")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20, help="measured at once")
    parser.add_argument("--raw-dir", type=Path, default=Path("../shared/data"), help="has MNIST/raw/*")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = compare(options.network, options)
    print(
        f"{options.network}: groups x replicas, foretold and measured ms a batch, their ratio (least, largest)"
    )
    for name, each in found.items():
        ratio = each["ratio"]
        print(
            f"{name}  {each['foretold_ms']['median']:8.1f} {each['measured_ms']['median']:8.1f}  "
            f"{ratio['median']:.2f} ({ratio['min']:.2f}, {ratio['max']:.2f})"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
