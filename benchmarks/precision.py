"""Training steps in bf16 against float32: a network's forward pass, backward pass and Adam, in turn (A B A B ...).

    python benchmarks/precision.py
    python benchmarks/precision.py --cases conv-16 --rounds 20

``bf16`` is what ``trainer.precision=bf16-mixed`` does: the forward pass under autocast. Times are of the processor,
medians over the rounds; ratios are those within a round. What bf16 gains depends on the processor, whose units for it
are named. ``error`` is that of the first batch's gradient of all parameters against float64, relative.
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median
from time import process_time
from typing import Any

import machine
import torch
import torch.nn.functional as F
from cases import ADAM
from timing import by_name, in_turn, ratios, spread
from torch import Tensor

from sglight.networks.network import StableNet
from sglight.process import keep_freed_memory
from sglight.strategies.optim import make_optimizer

_CONV = {"shape": (1, 28, 28), "kernel": "conv", "opening": "conv", "horizon": 4.0, "dynamics": "hamiltonian"}
_DENSE = {"shape": (784,), "kernel": "dense", "opening": "linear", "horizon": 4.0, "dynamics": "hamiltonian"}
# Batch size and network; the last of the convolutional ones is that of conf/experiment/mnist_conv.yaml.
CASES = {
    "conv-16": (128, {**_CONV, "channels": 16, "steps": 8}),
    "conv-32": (128, {**_CONV, "channels": 32, "steps": 4}),
    "conv-8-16-32": (
        128, {**_CONV, "channels": [8, 16, 32], "steps": 2, "horizon": 2.0, "opening_normalisation": "batch"}
    ),
    "dense-64": (128, {**_DENSE, "channels": 64, "steps": 32}),
    "dense-256": (256, {**_DENSE, "channels": 256, "steps": 32}),
    "dense-512": (256, {**_DENSE, "channels": 512, "steps": 16}),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), help="default: all")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    return parser.parse_args()


def units() -> str:
    """What the processor has for bf16."""
    found = [name for name, has in torch.cpu.get_capabilities().items() if "bf16" in name and has]
    return ", ".join(found) or "none"


class Training:
    """A network, its optimiser and one batch; in bf16 if ``lower``."""

    def __init__(
        self, batch: int, network: dict[str, Any], lower: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        self.lower, self.net = lower, StableNet(classes=10, seed=1, **network).to(dtype)
        self.optimizer = make_optimizer(ADAM, self.net.parameters())
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(batch, *network["shape"], generator=draw).to(dtype)
        self.labels = torch.randint(10, (batch,), generator=draw)

    def descend(self) -> None:
        """One forward and one backward pass."""
        self.net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.lower):
            logits = self.net(self.x)
        F.cross_entropy(logits.to(self.x.dtype), self.labels).backward()

    def step(self) -> None:
        """One training step."""
        self.descend()
        self.optimizer.step()

    def gradient(self) -> Tensor:
        """That of all parameters in one vector."""
        self.descend()
        return torch.cat([p.grad.double().flatten() for p in self.net.parameters() if p.grad is not None])

    def turn(self, seconds: float) -> float:
        """CPU milliseconds a step, over a turn of about the given length."""
        steps, start = 0, process_time()
        while (elapsed := process_time() - start) < seconds or not steps:
            self.step()
            steps += 1
        return 1e3 * elapsed / steps


def measure(case: tuple[int, dict[str, Any]], rounds: int, seconds: float) -> list[str]:
    """A row of the table."""
    exact = Training(*case, lower=False, dtype=torch.float64).gradient()
    trainings = {name: Training(*case, lower=name == "bf16") for name in ("float32", "bf16")}
    errors = [float((each.gradient() - exact).norm() / exact.norm()) for each in trainings.values()]
    turns = {name: partial(training.turn, seconds) for name, training in trainings.items()}
    times = by_name(in_turn(turns, rounds, warm_up=1))
    ratio = spread(ratios(times["float32"], times["bf16"]))
    return [
        *(f"{median(values):.2f}" for values in times.values()),
        f"{ratio['median']:.2f}",
        f"{ratio['min']:.2f} to {ratio['max']:.2f}",
        *(f"{error:.1e}" for error in errors),
    ]


def main() -> None:
    """Measure and print."""
    options = arguments()
    machine.set_threads(options.threads)
    keep_freed_memory()
    print(
        f"CPU ms a training step, medians of {options.rounds} turns, {machine.summary()}, {options.threads} thread(s)"
    )
    print(f"units for bf16: {units()}")
    row = "{:<14}{:>9}{:>9}{:>16}{:>15}{:>17}{:>12}"
    print(row.format("case", "float32", "bf16", "float32 / bf16", "range", "error float32", "error bf16"))
    for name in options.cases:
        print(row.format(name, *measure(CASES[name], options.rounds, options.seconds)), flush=True)


if __name__ == "__main__":
    main()
