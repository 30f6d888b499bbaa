"""Forward and backward pass of a segment against the loop that one would write at first.

    python benchmarks/segment.py
    python benchmarks/segment.py --cases dense-2x32 --rounds 20 --json

The naive loop holds one module a step (`nn.ParameterList` of weights and biases), runs on NCHW memory and leaves
everything to autograd. Both compute the same function (checked first) on the same threads and take turns (A B A B ...);
a turn is as many passes as fit into --seconds. The table shows medians over the turns.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import machine
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import by_name, in_turn, ratios, spread
from torch import Tensor, nn

from sglight.networks import Segment


class Case(NamedTuple):
    """A segment and the states that it gets."""

    dynamics: str
    kernel: str
    channels: int
    steps: int
    batch: int
    image: tuple[int, ...] = ()


CASES = {
    "dense-2x32": Case("hamiltonian", "dense", 2, 32, 64),
    "dense-2x32-antisymmetric": Case("antisymmetric", "dense", 2, 32, 64),
    "dense-2x32-leapfrog": Case("leapfrog", "dense", 2, 32, 64),
    "dense-64x16": Case("hamiltonian", "dense", 64, 16, 128),
    "conv-16x8-32": Case("hamiltonian", "conv", 16, 8, 32, (28, 28)),
    "conv-16x8-128": Case("hamiltonian", "conv", 16, 8, 128, (28, 28)),
}


class Naive(nn.Module):
    """The equations, step by step, each step with weights of its own."""

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        self.dynamics, self.h = segment.spec.dynamics, segment.step_size
        self.weights = nn.ParameterList(w.detach().clone() for w in segment.weight)
        self.dense = segment.weight.ndim == 3
        biases = segment.bias if self.dense else segment.bias[..., None, None]
        self.biases = nn.ParameterList(b.detach().clone() for b in biases)

    def K(self, w: Tensor, y: Tensor) -> Tensor:  # noqa: N802
        return F.linear(y, w) if self.dense else F.conv2d(y, w, padding=1)

    def Kt(self, w: Tensor, y: Tensor) -> Tensor:  # noqa: N802
        return F.linear(y, w.t()) if self.dense else F.conv_transpose2d(y, w, padding=1)

    def forward(self, state: Tensor) -> Tensor:
        for w, b in zip(self.weights, self.biases, strict=True):
            state = getattr(self, self.dynamics)(state, w, b)
        return state

    def antisymmetric(self, y: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return y + self.h * torch.tanh(0.5 * (self.K(w, y) - self.Kt(w, y)) + b)

    def hamiltonian(self, state: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y, z = state.chunk(2, 1)
        z = z - self.h * torch.tanh(self.Kt(w, y) + b)
        y = y + self.h * torch.tanh(self.K(w, z) + b)
        return torch.cat([y, z], 1)

    def leapfrog(self, state: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y, previous = state.chunk(2, 1)
        return torch.cat([2 * y - previous + self.h**2 * torch.tanh(-self.Kt(w, self.K(w, y)) + b), y], 1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args()


def one_pass(module: nn.Module, run: Callable[[Tensor], Tensor], state: Tensor, grad: Tensor) -> None:
    """Forward and backward; gradients are dropped, as an optimiser does with set_to_none."""
    state.grad = None
    for parameter in module.parameters():
        parameter.grad = None
    run(state).backward(grad)


def timed(go: Callable[[], None], seconds: float) -> float:
    """Seconds a pass, over a turn of about the given length."""
    passes, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not passes:
        go()
        passes += 1
    return elapsed / passes


def measure(case: Case, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians of the fused segment, of its own plain loop (`reference`) and of the naive one."""
    segment = Segment(case.dynamics, case.steps, case.channels, case.kernel, seed=1)
    naive = Naive(segment)
    draw = torch.Generator().manual_seed(1)
    shape = case.batch, segment.dynamics.fields * case.channels, *case.image
    state = torch.randn(shape, generator=draw).requires_grad_()
    grad = torch.randn(shape, generator=draw)
    runs = {
        "naive": (naive, naive.forward),
        "reference": (segment, segment.reference),
        "segment": (segment, segment.forward),
    }
    torch.testing.assert_close(segment(state), naive(state), rtol=1e-4, atol=1e-4)
    turns = {
        name: partial(timed, partial(one_pass, *run, state, grad), seconds) for name, run in runs.items()
    }
    times = by_name(in_turn(turns, rounds, warm_up=1))
    speedup = spread(ratios(times["naive"], times["segment"]))
    return {
        **case._asdict(),
        **{f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()},
        **{f"{name}_min_ms": 1e3 * min(values) for name, values in times.items()},
        "speedup": speedup["median"],
        "speedup_min": speedup["min"],
        "speedup_max": speedup["max"],
    }


def show(results: dict[str, Any]) -> None:
    """The table."""
    title = f"forward + backward, ms, median of {results['rounds']} turns, {results['machine']}"
    table = Table(title=title)
    for name in ("case", "naive loop", "own plain loop", "segment", "naive / segment", "range"):
        table.add_column(name, justify="left" if name == "case" else "right")
    for name, row in results["cases"].items():
        numbers = (f"{row[k]:.2f}" for k in ("naive_ms", "reference_ms", "segment_ms"))
        span = f"{row['speedup_min']:.2f} to {row['speedup_max']:.2f}"
        table.add_row(name, *numbers, f"{row['speedup']:.2f}", span)
    Console().print(table)


def main() -> None:
    """Measure and print."""
    options = arguments()
    machine.set_threads(options.threads)
    results = {
        "rounds": options.rounds,
        "machine": f"{machine.summary()}, {options.threads} thread(s)",
        "cases": {name: measure(CASES[name], options.rounds, options.seconds) for name in options.cases},
    }
    print(json.dumps(results, indent=2)) if options.json else show(results)


if __name__ == "__main__":
    main()
