"""Memory for activations against the number of steps, stored and rebuilt (`model.reversible=true`).

    python benchmarks/reversible.py
    python benchmarks/reversible.py --kernel conv --steps 16 64 256 --json

For each N, two figures a variant: the bytes that autograd keeps between the passes (counted by hooks, each storage
once, parameters and weights derived from them left out), and the growth of the process's resident set at its peak over
forward and backward (each measurement in a fresh process, which has first run a segment of one step; Linux only).
Gradients of the parameters, which grow with N as the parameters do, and what the allocator holds back are in the
second figure. Then the time of both passes, in turn (A B A B ...), medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import machine
import torch
from rich.console import Console
from rich.table import Table
from timing import by_name, in_turn, ratios
from torch import Tensor

from sglight.networks import Segment

MIB = 1 << 20


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", choices=["dense", "conv"], default="dense", help="default: %(default)s")
    parser.add_argument("--dynamics", choices=["hamiltonian", "leapfrog"], default="hamiltonian")
    parser.add_argument("--normalisation", choices=["none", "group", "layer"], default="none")
    parser.add_argument("--channels", type=int, help="width (default: 16 dense, 4 conv)")
    parser.add_argument("--batch", type=int, help="samples (default: 4096 dense, 32 conv of 28x28)")
    parser.add_argument(
        "--steps",
        type=int,
        nargs="*",
        default=[16, 32, 64, 128, 256, 512, 1024],
        help="N (default: 16 ... 1024)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--resident", choices=["stored", "rebuilt"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.channels = options.channels or {"dense": 16, "conv": 4}[options.kernel]
    options.batch = options.batch or {"dense": 4096, "conv": 32}[options.kernel]
    if options.batch in options.steps:
        parser.error(
            f"--batch {options.batch} must differ from the numbers of steps: tensors are told apart by it"
        )
    return options


def build(options: argparse.Namespace, steps: int, rebuilt: bool) -> tuple[Segment, Tensor]:
    """A segment and a state for it."""
    segment = Segment(
        options.dynamics, steps, options.channels, options.kernel, normalisation=options.normalisation, groups=2,
        reversible=rebuilt, seed=1,
    )  # fmt: skip
    image = (28, 28) if options.kernel == "conv" else ()
    return segment, torch.randn(options.batch, 2 * options.channels, *image).requires_grad_()


def both_passes(segment: Segment, state: Tensor) -> float:
    """Seconds of forward and backward."""
    segment.zero_grad(set_to_none=True)
    state.grad = None
    start = time.perf_counter()
    segment(state).sum().backward()
    return time.perf_counter() - start


def kept_bytes(segment: Segment, state: Tensor) -> int:
    """Bytes of the tensors with one row a sample that autograd keeps."""
    storages: dict[int, tuple[Any, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        if len(tensor) == len(state):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        segment(state)
    return sum(size for _, size in storages.values())


def resident_growth(options: argparse.Namespace) -> int:
    """Bytes by which this process's peak grows over the two passes."""
    both_passes(*build(options, 1, options.resident == "rebuilt"))
    segment, state = build(options, options.steps[0], options.resident == "rebuilt")
    # Linux: forget the peak of the imports, then read the new one (getrusage's is inherited from the parent).
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    both_passes(segment, state)
    return status("VmHWM") - before


def status(key: str) -> int:
    """A size in bytes from the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def in_fresh_process(options: argparse.Namespace, steps: int, name: str) -> int:
    """`resident_growth` of one variant."""
    same = ("kernel", "dynamics", "normalisation", "channels", "batch", "threads")
    keys = [part for key in same for part in (f"--{key}", str(getattr(options, key)))]
    command = [sys.executable, __file__, *keys, "--steps", str(steps), "--resident", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(options: argparse.Namespace, steps: int) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"steps": steps}
    parts = {name: build(options, steps, name == "rebuilt") for name in ("stored", "rebuilt")}
    for name, part in parts.items():
        row[f"{name}_kept_bytes"] = kept_bytes(*part)
        row[f"{name}_resident_bytes"] = in_fresh_process(options, steps, name)
    runs = {name: partial(both_passes, *part) for name, part in parts.items()}
    times = by_name(in_turn(runs, options.rounds, warm_up=1))
    row |= {f"{name}_s": statistics.median(values) for name, values in times.items()}
    return row | {"time_ratio": statistics.median(ratios(times["rebuilt"], times["stored"]))}


def show(results: dict[str, Any]) -> None:
    """The table."""
    table = Table(title=results["title"], caption="MiB; time: forward + backward")
    heads = ("N", "kept, stored", "rebuilt", "resident, stored", "rebuilt", "s, stored", "rebuilt", "ratio")
    for head in heads:
        table.add_column(head, justify="right")
    for row in results["rows"]:
        sizes = [
            f"{row[f'{v}_{k}_bytes'] / MIB:.1f}" for k in ("kept", "resident") for v in ("stored", "rebuilt")
        ]
        seconds = [f"{row[f'{v}_s']:.3f}" for v in ("stored", "rebuilt")]
        table.add_row(str(row["steps"]), *sizes, *seconds, f"{row['time_ratio']:.2f}")
    Console().print(table)


def main() -> None:
    """Measure and print."""
    options = arguments()
    machine.set_threads(options.threads)
    if options.resident:
        print(resident_growth(options))
        return
    state = f"batch {options.batch}, {options.channels} channels" + (
        ", 28x28" if options.kernel == "conv" else ""
    )
    results = {
        "title": f"{options.dynamics}, {options.kernel}, {options.normalisation}, {state}; {machine.summary()}, "
        f"{options.threads} thread(s)",
        "rounds": options.rounds,
        "rows": [measure(options, steps) for steps in options.steps],
    }
    print(json.dumps(results, indent=2)) if options.json else show(results)


if __name__ == "__main__":
    main()
