"""Two stages on two workers against one, against backpropagation, and against PyTorch's own ways to use two processes.

python benchmarks/stages.py --profile                # what the stages and their parts cost, for every cut
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait do not spin

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sglight.estimators import synthetic_gradient
from sglight.networks.network import NetworkSpec, Stage
from sglight.strategies.dni import DNI
from sglight.strategies.optim import make_optimizer

ADAM = {"name": "adam", "lr": 1e-3}


@dataclass(frozen=True)
class Case:
    """A network, the estimator at its cut, and the size of a batch."""

    batch: int
    network: dict[str, Any]
    estimator: dict[str, Any]

    @property
    def spec(self) -> NetworkSpec:
        """The network's."""
        return NetworkSpec(**self.network)

    def dni(self, lag: int = 1, diagnose: int = 0) -> DNI:
        """Two stages."""
        estimator = {**self.estimator, "optimizer": ADAM}
        return DNI(
            self.network, ADAM, stages=2, lag=lag, estimator=estimator, diagnose_every_n_batches=diagnose
        )


# No batch normalisation (conf/experiment/mnist_conv.yaml has it): halved and micro-batches would change the network.
_SHARED = {"classes": 10, "dynamics": "hamiltonian", "horizon": 4.0, "seed": 1}
CASES = {
    "conv": Case(
        128,
        {
            **_SHARED, "shape": (1, 28, 28), "kernel": "conv", "channels": 16, "steps": 16, "opening": "conv"
        },
        {"name": "conv", "hidden": [32], "kernel_size": 1, "conditional": True},
    ),
    "dense": Case(
        256,
        {**_SHARED, "shape": (784,), "kernel": "dense", "channels": 256, "steps": 32, "opening": "linear"},
        {"name": "mlp", "hidden": [256], "conditional": True},
    ),
}  # fmt: skip


def pool(case: Case, raw_dir: Path | None, count: int = 32) -> list[tuple[Tensor, Tensor]]:
    """``count`` batches: of MNIST where it is at hand, else of random numbers."""
    size = case.batch * count
    if raw_dir is not None and (raw_dir / "MNIST" / "raw").is_dir():
        from torchvision.datasets import MNIST

        data = MNIST(str(raw_dir), train=True, download=False)
        x, y = (data.data[:size].float() / 255 - 0.1307) / 0.3081, data.targets[:size]
    else:
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(size, 28, 28, generator=draw)
        y = torch.randint(10, (size,), generator=draw)
    x = x.reshape(size, *case.spec.shape)
    return list(zip(x.split(case.batch), y.split(case.batch), strict=True))


class Clock:
    """Wall and CPU seconds of named pieces of work, round by round."""

    def __init__(self) -> None:
        self.wall: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Do it and note how long it took."""
        cpu, start = process_time(), perf_counter()
        result = work()
        end, cpu_end = perf_counter(), process_time()
        self.wall.setdefault(name, []).append(end - start)
        self.cpu.setdefault(name, []).append(cpu_end - cpu)
        return result

    def typical(self, warm_up: int = 2) -> dict[str, dict[str, float]]:
        """Medians in ms without the first rounds."""
        return {
            name: {"wall_ms": 1e3 * median(wall[warm_up:]), "cpu_ms": 1e3 * median(self.cpu[name][warm_up:])}
            for name, wall in self.wall.items()
        }


class Cut:
    """Two stages with a cut at ``position``, which train as `DNI` does, in one process and without Lightning."""

    def __init__(self, case: Case, position: int, diary: Clock) -> None:
        spec, e = case.spec, case.estimator
        self.diary, self.position = diary, position
        self.first, self.second = Stage(spec, 0, position), Stage(spec, position)
        self.estimator = synthetic_gradient(
            e["name"], spec.state_shape(position), spec.classes, e.get("hidden", []), e["conditional"],
            e.get("kernel_size", 3), spec.seed, "estimators", position,
        )  # fmt: skip
        self.estimator.optimizer = make_optimizer(ADAM, self.estimator.parameters())
        self.optimizers = [make_optimizer(ADAM, stage.parameters()) for stage in (self.first, self.second)]
        self.time = spec.time(position)
        self.buffer: Tensor | None = None

    def batch(self, x: Tensor, y: Tensor) -> None:
        """One batch, every phase on the clock."""

        def lap(name: str, work: Callable[[], Any]) -> Any:
            return self.diary.time(f"{self.position} {name}", work)

        output = lap("0 forward", lambda: self.first(x))
        state = output.detach()
        if self.buffer is None:
            self.buffer = torch.empty_like(state)
        lap("copy", lambda: self.buffer.copy_(state))
        gradient = lap("0 estimate", lambda: self.estimator.estimate(state, y, self.time))
        lap("0 backward", lambda: output.backward(gradient))
        lap("0 update", lambda: self.update(0, len(y)))
        received = state.requires_grad_()
        logits = lap("1 forward", lambda: self.second(received))
        lap("1 backward", lambda: F.cross_entropy(logits, y, reduction="sum").backward())
        lap("1 update", lambda: self.update(1, len(y)))
        target = received.grad
        lap("0 learn", lambda: self.estimator.learn(state.detach(), y, target, self.time))

    def update(self, i: int, count: int) -> None:
        """Adam's step on the mean gradient."""
        optimizer = self.optimizers[i]
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        torch._foreach_mul_(gradients, 1 / count)
        optimizer.step()
        optimizer.zero_grad()


PHASES = (
    "0 forward",
    "0 estimate",
    "0 backward",
    "0 update",
    "0 learn",
    "1 forward",
    "1 backward",
    "1 update",
)


def profile_cuts(
    case: Case, batches: list[tuple[Tensor, Tensor]], rounds: int, around: int
) -> dict[int, dict[str, Any]]:
    """Phases of both stages, in turn for the chosen cut and ``around`` positions on either side of it."""
    steps, chosen = case.spec.total_steps, case.dni().cuts[1]
    positions = range(max(chosen - around, 1), min(chosen + around, steps - 1) + 1)
    diary = Clock()
    cuts = [Cut(case, position, diary) for position in positions]
    for x, y in islice(cycle(batches), rounds):
        for cut in cuts:
            cut.batch(x, y)
    times = diary.typical()
    return {
        p: {
            "chosen": p == chosen,
            "phases": {name: times[f"{p} {name}"] for name in (*PHASES, "copy")},
            "predicted": case.spec.stage_costs([0, p, steps], case.dni().extra_cost()),
        }
        for p in positions
    }


def profile_parts(
    case: Case, batches: list[tuple[Tensor, Tensor]], rounds: int
) -> dict[str, dict[str, float]]:
    """Forward + backward of a network's parts, and of the estimator at the chosen cut.

    A step is a quarter of the difference between stages of two and of six steps in the middle of the network.
    """
    spec, position = case.spec, case.dni().cuts[1]
    cut = Cut(case, position, Clock())
    middle = spec.total_steps // 2
    two, six = Stage(spec, middle, middle + 2), Stage(spec, middle, middle + 6)
    whole = Stage(spec)
    state, gradient = boundary(cut, *batches[0])
    diary = Clock()

    def both(module: nn.Module, forward: Callable[[], Tensor], gradient: Tensor | None) -> None:
        module.zero_grad()
        forward().backward(gradient)

    assert whole.classifier is not None
    for x, y in islice(cycle(batches), rounds):
        leaf = state.clone().requires_grad_()
        works: list[tuple[str, Callable[[], Any]]] = [
            ("opening", lambda x=x: both(whole, lambda: whole.open(x), gradient)),
            ("2 steps", lambda s=leaf: both(two, lambda: two(s), gradient)),
            ("6 steps", lambda s=leaf: both(six, lambda: six(s), gradient)),
            (
                "classifier, loss",
                lambda s=leaf, y=y: both(whole, lambda: F.cross_entropy(whole.classifier(s), y), None),
            ),
            ("estimate", lambda y=y: cut.estimator.estimate(state, y, cut.time)),
            ("learn", lambda y=y: cut.estimator.learn(state, y, gradient, cut.time)),
        ]
        for name, work in works:
            leaf.grad = None
            diary.time(name, work)
    times = diary.typical()
    six_steps, two_steps = times.pop("6 steps"), times.pop("2 steps")
    step = {kind: (six_steps[kind] - two_steps[kind]) / 4 for kind in six_steps}
    beside = {kind: two_steps[kind] - 2 * step[kind] for kind in step}
    parts = {"opening": times["opening"], "step": step, "beside the steps of a stage": beside, **times}
    counts = multiplications(case, position)
    unit = step["cpu_ms"] / counts["step"]
    for name, part in parts.items():
        if name in counts:
            part["megamults"] = counts[name] * case.batch / 1e6
            part["ms_per_megamult"] = part["cpu_ms"] / part["megamults"]
            # What the cost model, which counts multiplications, would have to multiply its count with.
            part["factor"] = part["cpu_ms"] / counts[name] / unit
    return parts


def boundary(cut: Cut, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """State and true gradient at a cut, as they lie in memory."""
    state = cut.first(x).detach().requires_grad_()
    F.cross_entropy(cut.second(state), y, reduction="sum").backward()
    assert state.grad is not None
    return state.detach(), state.grad


def multiplications(case: Case, position: int) -> dict[str, float]:
    """Multiplications per sample of the parts, three passes each (forward, two backward); a prediction is one."""
    spec = case.spec
    costs = spec.step_costs()
    step = costs[spec.total_steps // 2]
    # The model's own extra is the estimator in units of 3 passes, with one prediction and one lesson.
    prediction = case.dni().extra_cost()(spec.state_shape(position)) * 3 / 4  # type: ignore[operator]
    return {
        "opening": 3 * (costs[0] - step),
        "step": 3 * step,
        "classifier, loss": 3 * (costs[-1] - step),
        "estimate": prediction,
        "learn": 3 * prediction,
    }


def show_profile(name: str, case: Case, parts: dict[str, Any], cuts: dict[int, Any]) -> None:
    """Two tables."""
    console = Console(width=150)
    table = Table(title=f"{name}: parts, forward + backward, batch {case.batch}, medians")
    for head in ("part", "wall ms", "CPU ms", "10^6 mult.", "ps / mult.", "of a step's"):
        table.add_column(head, justify="left" if head == "part" else "right")
    for part, t in parts.items():
        row = [f"{t['wall_ms']:.3f}", f"{t['cpu_ms']:.3f}"]
        if "factor" in t:
            row += [f"{t['megamults']:.1f}", f"{1e3 * t['ms_per_megamult']:.1f}", f"{t['factor']:.2f}"]
        table.add_row(part, *row)
    console.print(table)
    table = Table(title=f"{name}: both stages by cut, CPU ms, medians (* chosen by the cost model)")
    for head in ("cut", *PHASES, "stage 0", "stage 1", "0 / 1", "predicted", "slowest", "copy"):
        table.add_column(head, justify="right")
    for position, row in cuts.items():
        cells = [row["phases"][phase]["cpu_ms"] for phase in PHASES]
        totals = sum(cells[:5]), sum(cells[5:])
        predicted = row["predicted"][0] / row["predicted"][1]
        table.add_row(
            f"{position}{'*' if row['chosen'] else ''}",
            *(f"{cell:.2f}" for cell in (*cells, *totals)),
            f"{totals[0] / totals[1]:.2f}",
            f"{predicted:.2f}",
            f"{max(totals):.2f}",
            f"{row['phases']['copy']['cpu_ms']:.2f}",
        )
    console.print(table)


def machine() -> dict[str, Any]:
    """What was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=(*CASES, "both"), default="both")
    parser.add_argument("--rounds", type=int, help="default: 7 (--profile: 30)")
    parser.add_argument("--raw-dir", type=Path, default=Path("../shared/data"), help="has MNIST/raw/*")
    parser.add_argument("--profile", action="store_true", help="measure the parts of the stages instead")
    parser.add_argument(
        "--around", type=int, default=3, help="cuts on either side of the chosen one (--profile)"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def names(options: argparse.Namespace) -> Iterator[str]:
    """The networks that were asked for."""
    return (name for name in CASES if options.network in (name, "both"))


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """The costs of all parts and cuts, one thread."""
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in names(options):
        case, rounds = CASES[name], options.rounds or 30
        batches = pool(case, options.raw_dir)
        parts = profile_parts(case, batches, rounds)
        cuts = profile_cuts(case, batches, rounds, options.around)
        show_profile(name, case, parts, cuts)
        results[name] = {"parts": parts, "cuts": cuts}
    return results


def main() -> None:
    """Measure, print tables, and write JSON if asked to."""
    options = arguments()
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    results = {"machine": facts, "profile": profile(options)}
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
