"""bf16-mixed against 32-true on the CPU: passes of segments, and training steps of whole networks.

    python benchmarks/precision.py
    python benchmarks/precision.py --cases conv-16 mnist_conv --rounds 15
    python benchmarks/precision.py --cases conv-16 --profile

A pass of a segment is forward and backward. A training step of a network has the loss and Adam besides, without
Lightning. Both precisions take turns on the same weights and batch (A B A B ...); a turn is as many passes as fit into
--seconds. Times are CPU seconds on one thread, so that other work on the machine counts as little as can be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import cases
import machine
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from segment import one_pass
from timing import by_name, cpu_s_each, in_turn, ratios, spread
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sglight.networks import NetworkSpec, Segment, Stage
from sglight.networks.precision import has_bf16_units
from sglight.process import keep_freed_memory

# Dynamics, kernel, channels, steps, and the shape of the batch without its channels.
SEGMENTS = {
    "conv-16": ("hamiltonian", "conv", 16, 4, (128, 28, 28)),
    "conv-8": ("hamiltonian", "conv", 8, 4, (128, 28, 28)),
    "conv-6": ("hamiltonian", "conv", 6, 4, (128, 28, 28)),
    "conv-32": ("hamiltonian", "conv", 32, 4, (128, 14, 14)),
    "leapfrog-16": ("leapfrog", "conv", 16, 4, (128, 28, 28)),
    "euler-16": ("euler", "conv", 16, 4, (128, 28, 28)),
    "dense-256": ("hamiltonian", "dense", 256, 32, (256,)),
    "dense-64": ("hamiltonian", "dense", 64, 16, (128,)),
}
# The network of conf/experiment/mnist_conv.yaml, and those of `stages.py`, each with its batch size.
NETWORKS = {
    "mnist_conv": (
        {
            "shape": (1, 28, 28), "classes": 10, "kernel": "conv", "channels": [8, 16, 32], "steps": 2,
            "horizon": 2.0, "opening": "conv", "opening_normalisation": "batch",
        },
        128,
    ),
    "network-conv-16": (cases.CASES["conv"].network, cases.CASES["conv"].batch),
    "network-dense-256": (cases.CASES["dense"].network, cases.CASES["dense"].batch),
}  # fmt: skip
Work = Callable[[], None]


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [*SEGMENTS, *NETWORKS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=names, default=names, help="default: all")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="list the operations instead")
    return parser.parse_args()


def segment_pass(name: str) -> Work:
    """Forward and backward pass of a segment."""
    dynamics, kernel, channels, steps, (batch, *image) = SEGMENTS[name]
    segment = Segment(dynamics, steps, channels, kernel, seed=1)
    draw = torch.Generator().manual_seed(1)
    shape = batch, segment.dynamics.fields * channels, *image
    state, grad = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    if image:
        state, grad = (x.contiguous(memory_format=torch.channels_last) for x in (state, grad))
    state.requires_grad_()
    return partial(one_pass, segment, segment, state, grad)


def training_step(name: str) -> Work:
    """A training step of a network."""
    network, batch = NETWORKS[name]
    spec = NetworkSpec(**network)
    draw = torch.Generator().manual_seed(1)
    x, y = (
        torch.randn(batch, *spec.shape, generator=draw),
        torch.randint(spec.classes, (batch,), generator=draw),
    )
    net: nn.Module = Stage(spec)
    # A small rate: the states stay those of a young network.
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6, foreach=True)

    def work() -> None:
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return work


def in_precision(work: Work, bf16: bool) -> None:
    """Do the work as `trainer.precision=bf16-mixed` has it done, or in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        work()


def measure(work: Work, rounds: int, seconds: float) -> dict[str, list[float]]:
    """CPU seconds in both precisions, round by round."""
    turns = {
        name: partial(cpu_s_each, partial(in_precision, work, name == "bf16-mixed"), seconds)
        for name in ("32-true", "bf16-mixed")
    }
    return by_name(in_turn(turns, rounds, warm_up=1))


def operations(work: Work, bf16: bool) -> str:
    """The operations that take most of the time, in one piece of work out of five."""
    for _ in range(3):
        in_precision(work, bf16)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(5):
            in_precision(work, bf16)
    return str(recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=16))


def main() -> None:
    """Measure and print."""
    options = arguments()
    machine.set_threads(1)
    keep_freed_memory()  # as a run does
    works = {name: (segment_pass if name in SEGMENTS else training_step)(name) for name in options.cases}
    if options.profile:
        for name, work in works.items():
            for bf16 in (False, True):
                print(f"\n{name}, {'bf16-mixed' if bf16 else '32-true'}, 5 times")
                print(operations(work, bf16))
        return
    units = "bf16 units" if has_bf16_units() else "no bf16 units: segments run in float32"
    table = Table(title=f"CPU ms, median of {options.rounds} turns, 1 thread, {machine.processor()}, {units}")
    for column in ("case", "32-true", "bf16-mixed", "32-true / bf16-mixed", "range"):
        table.add_column(column)
    for name, work in works.items():
        times = measure(work, options.rounds, options.seconds)
        ratio = spread(ratios(*times.values()))
        row = [f"{1e3 * median(values):.2f}" for values in times.values()]
        table.add_row(name, *row, f"{ratio['median']:.2f}", f"{ratio['min']:.2f} to {ratio['max']:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
