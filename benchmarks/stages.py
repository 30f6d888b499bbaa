"""Two stages on two workers against one, against backpropagation, and against PyTorch's own ways to use two processes.

    python benchmarks/stages.py --json stages.json       # everything, both networks: about 25 minutes
    python benchmarks/stages.py --network conv --only dni-1 dni-2-lag1 1f1b --rounds 3
    python benchmarks/stages.py --profile                # what the stages and their parts cost, for every cut

All methods train the same network from the same initial values on the same batches and take turns (A B C A B C ...),
each time in new processes with one thread each (--threads). ``dni-W-lagD`` and ``backprop`` run through Lightning's
Trainer as a user's run does, but for logger, checkpoints and bar; what they stand against are plain loops without
Lightning (`baselines.py`), which favours the latter. The pipelines get the stages of the DNI cut (--pipeline-cut), and
the number of microbatches that is best in a sweep beforehand.

Wall time is that of the process which needs longest for the measured batches, between batches in full swing: neither
the filling nor the draining of queues counts. It is wall_with_ends_ms in the JSON from the first start to the last end.
CPU time is each process's own; "by CPU" is dni-1's over that of the busiest process: the speed-up if nobody waited,
which other programs disturb least. Ratios are taken within a round, then the median over rounds. The losses of all
methods with true gradients have to agree, and those of dni-1 and dni-W-lag1 have to be the same.

Environment variables reach all processes. On Linux, glibc gives large tensors back to the system and fetches them
again in every batch, at the price of page faults; MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ stop that.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait do not spin

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from baselines import (
    ADAM,
    CASES,
    Batch,
    Case,
    Lap,
    Length,
    bare,
    data_parallel,
    has_mnist,
    in_processes,
    loop,
    page_faults,
    pipeline,
    pool,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sglight.networks.network import Stage
from sglight.strategies.backprop import Backprop
from sglight.strategies.optim import make_optimizer

MICROBATCHES = (2, 4, 8, 16)
MEASUREMENT_S = 5.0
# True gradients: the first losses have to agree.
COMPARED_LOSSES, TOLERANCE = 5, 1e-3


class Stopwatch(pl.Callback):
    """Measures on each worker, and notes the losses where the last stage lives."""

    def __init__(self, length: Length) -> None:
        self.length, self.lap = length, Lap()
        self.laps: list[Lap] = []

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        record, self.losses = module.record, []

        def listen(loss: Tensor, logits: Tensor, labels: Tensor) -> None:
            self.losses.append(loss.detach() / len(labels))
            record(loss, logits, labels)

        module.record = listen

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.lap.tick(batch_idx + 1, self.length)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.lap.losses = [float(loss) for loss in self.losses]
        self.laps = module.placement.peers.gather(self.lap)


@dataclass
class Loader:
    """An epoch."""

    batches: list[Batch]
    length: Length

    def __len__(self) -> int:
        return self.length.total

    def __iter__(self) -> Iterator[Batch]:
        return self.length.batches(self.batches)


def fit(
    case: Case, raw_dir: Path, length: Length, kind: str, workers: int, stages: int, lag: int, diagnose: int
) -> list[Lap]:
    """Train ``dni`` or ``backprop`` by Lightning in this process, one of ``workers``."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    module = case.dni(stages, lag, diagnose) if kind == "dni" else Backprop(case.network, ADAM)
    stopwatch = Stopwatch(length)
    trainer = pl.Trainer(
        accelerator="cpu", devices=workers, strategy=lightning_strategy(workers), max_epochs=1, logger=False,
        log_every_n_steps=10, callbacks=[stopwatch], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, Loader(pool(case, raw_dir), length))
    return stopwatch.laps


def lightning_strategy(workers: int) -> Any:
    """What places the stages."""
    if workers == 1:
        return "auto"
    from sglight.parallel.strategy import StageStrategy

    return StageStrategy()


def measure_dni(
    case: Case,
    raw_dir: Path,
    length: Length,
    workers: int,
    stages: int,
    lag: int,
    diagnose: int,
    threads: int,
) -> list[Lap]:
    """What each of the workers measured."""
    args = (case, raw_dir, length, "dni", workers, stages, lag, diagnose)
    if workers == 1:
        return in_processes(1, threads, fit, *args)[0]
    from sglight.parallel.launcher import launch

    return launch(fit, *args, workers=workers, threads=threads)


# What measures one method once.
Method = Callable[[Length], list[Lap]]
# What hears of the progress.
Tell = Callable[[str], Any]


def plain_methods(case: Case, options: argparse.Namespace) -> dict[str, Method]:
    """What uses true gradients, but for the pipelines."""
    raw, threads = options.raw_dir, options.threads

    def backprop(length: Length, threads: int) -> list[Lap]:
        args = (case, raw, length, "backprop", 1, 1, 0, 0)
        return in_processes(1, threads, fit, *args)[0]

    return {
        "backprop": lambda length: backprop(length, threads),
        "backprop-2t": lambda length: backprop(length, 2 * threads),
        "bare": lambda length: in_processes(1, threads, loop, case, raw, length, bare),
        "bare-2t": lambda length: in_processes(1, 2 * threads, loop, case, raw, length, bare),
        "ddp": lambda length: in_processes(2, threads, loop, case, raw, length, data_parallel),
    }


def dni_methods(case: Case, options: argparse.Namespace) -> dict[str, Method]:
    """DNI on one worker with lag 1, and on more with every lag."""
    stages = options.stages or max(2, *options.workers)
    runs = [(w, lag) for w in options.workers for lag in (options.lags if w > 1 else [1])]

    def method(workers: int, lag: int) -> Method:
        return lambda length: measure_dni(
            case, options.raw_dir, length, workers, stages, lag, options.diagnose, options.threads
        )

    return {f"dni-{w}-lag{lag}" if w > 1 else "dni-1": method(w, lag) for w, lag in runs}


def pipelines(case: Case, options: argparse.Namespace) -> dict[str, Callable[[int], Method]]:
    """GPipe and 1F1B for any number of microbatches."""
    cut = options.pipeline_cut or case.dni().cuts[1]

    def method(kind: str, microbatches: int) -> Method:
        return lambda length: in_processes(
            2, options.threads, loop, case, options.raw_dir, length, pipeline, kind, microbatches, cut
        )

    return {
        "gpipe": lambda microbatches: method("gpipe", microbatches),
        "1f1b": lambda microbatches: method("1f1b", microbatches),
    }


def measure(method: Method, length: Length) -> dict[str, Any]:
    """One measurement, with all that is raw."""
    laps = method(length)
    known = [lap.losses for lap in laps if lap.losses]
    spans = [lap.end - lap.start for lap in laps]
    ends = max(lap.end for lap in laps) - min(lap.start for lap in laps)
    return {
        "wall_ms": 1e3 * max(spans) / length.measured,
        "wall_with_ends_ms": 1e3 * ends / length.measured,
        "cpu_ms": [1e3 * lap.cpu_s / length.measured for lap in laps],
        "page_faults": [lap.page_faults / length.measured for lap in laps],
        # Of a batch that was halved each process knows the mean of its half.
        "losses": [sum(values) / len(values) for values in zip(*known, strict=True)],
        "laps": [asdict(lap) for lap in laps],
        "load": os.getloadavg()[0],
    }


def calibrate(case: Case, options: argparse.Namespace) -> Length:
    """The length of a measurement, the same for all methods."""
    if options.batches:
        return Length(options.batches)
    trial = Length(3, warm_up=2, cool_down=0)
    ms = measure(plain_methods(case, options)["bare"], trial)["wall_ms"]
    return Length(max(8, round(MEASUREMENT_S / (ms / 1e3))))


def sweep(
    makers: Mapping[str, Callable[[int], Method]], length: Length, tell: Tell
) -> dict[str, dict[int, float]]:
    """Wall ms a batch of each pipeline for each number of microbatches; half the batches, the better of two."""
    short = Length(max(length.measured // 2, 4), length.warm_up, length.cool_down)
    results: dict[str, dict[int, list[float]]] = {name: {n: [] for n in MICROBATCHES} for name in makers}
    for _ in range(2):
        for name, make in makers.items():
            for n in MICROBATCHES:
                results[name][n].append(measure(make(n), short)["wall_ms"])
                tell(f"sweep: {name}, {n} microbatches: {results[name][n][-1]:.1f} ms")
    return {name: {n: min(values) for n, values in row.items()} for name, row in results.items()}


def compare(name: str, case: Case, options: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """All methods in turn, round by round."""
    chosen = {*(options.only or ())}
    methods = {**dni_methods(case, options), **plain_methods(case, options)}
    makers = pipelines(case, options)
    if unknown := chosen - {*methods, *makers}:
        raise SystemExit(
            f"--only: no {', '.join(sorted(unknown))}; there are {', '.join([*methods, *makers])}"
        )
    methods = {k: m for k, m in methods.items() if not chosen or k in chosen}
    length = calibrate(case, options)
    swept = sweep({k: m for k, m in makers.items() if not chosen or k in chosen}, length, tell)
    best = {k: min(row, key=lambda n: row[n]) for k, row in swept.items()}
    methods |= {k: makers[k](n) for k, n in best.items()}
    rounds = []
    for i in range(options.rounds or 7):
        rounds.append({k: measure(method, length) for k, method in methods.items()})
        tell(f"{name}, round {i + 1}: " + ", ".join(f"{k} {m['wall_ms']:.1f}" for k, m in rounds[-1].items()))
        check_losses(rounds[-1])
    return {
        "length": asdict(length),
        "sweep": swept,
        "microbatches": best,
        "summary": summarise(rounds),
        "ratios": ratios(rounds),
        "rounds": rounds,
    }


def check_losses(measured: Mapping[str, dict[str, Any]]) -> None:
    """True gradients descend alike, and synthetic ones of the same lag do to the last bit, wherever the stages are."""
    true = {k: m["losses"][:COMPARED_LOSSES] for k, m in measured.items() if not k.startswith("dni")}
    for k, losses in true.items():
        first = next(iter(true.values()))
        near = all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(losses, first, strict=True))
        assert near, f"losses of {k}: {losses}, not {first} as of {next(iter(true))}"
    placed = {k: m["losses"] for k, m in measured.items() if k == "dni-1" or k.endswith("-lag1")}
    for k, losses in placed.items():
        first = next(iter(placed.values()))
        assert losses == first, f"losses of {k}: {losses}, not {first} as of {next(iter(placed))}"


def summarise(rounds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Over the rounds, by method."""

    def each(name: str, key: str) -> list[float]:
        """Of each process."""
        return [median(values) for values in zip(*(r[name][key] for r in rounds), strict=True)]

    result = {}
    for name in rounds[0]:
        wall = [r[name]["wall_ms"] for r in rounds]
        result[name] = {
            "wall_ms": median(wall),
            "wall_min_ms": min(wall),
            "wall_max_ms": max(wall),
            "cpu_ms": each(name, "cpu_ms"),
            "page_faults": each(name, "page_faults"),
            "last_loss": rounds[-1][name]["losses"][-1],
        }
    return result


def ratios(rounds: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of wall times: every method over each decoupled one with lag 1, and a few more."""
    names = list(rounds[0])
    quick = [name for name in names if name.startswith("dni") and name.endswith("lag1")]
    pairs = [(name, fast) for fast in quick for name in names if name != fast]
    pairs += [
        (a, b) for a, b in (("backprop", "bare"), ("bare", "bare-2t"), ("bare", "ddp")) if {a, b} <= {*names}
    ]
    result = {}
    for a, b in pairs:
        values = [r[a]["wall_ms"] / r[b]["wall_ms"] for r in rounds]
        result[f"{a} / {b}"] = {"median": median(values), "min": min(values), "max": max(values)}
    return result


def speed(summary: dict[str, dict[str, Any]], name: str) -> tuple[str, str]:
    """How many times faster than dni-1: by wall time, and by the CPU time of the busiest process."""
    if "dni-1" not in summary:
        return "", ""
    one, it = summary["dni-1"], summary[name]
    return f"{one['wall_ms'] / it['wall_ms']:.2f}", f"{max(one['cpu_ms']) / max(it['cpu_ms']):.2f}"


def show(name: str, case: Case, results: dict[str, Any]) -> None:
    """Tables of what `compare` found."""
    console = Console(width=120)
    rounds, length = len(results["rounds"]), results["length"]["measured"]
    table = Table("method", title=f"{name}: ms a batch of {case.batch}, {rounds} rounds of {length} batches")
    for head in (
        "wall, median",
        "min",
        "max",
        "CPU by process",
        "page faults",
        "dni-1 / it",
        "by CPU",
        "last loss",
    ):
        table.add_column(head, justify="right")
    summary = results["summary"]
    for k, row in summary.items():
        label = f"{k}, {results['microbatches'][k]} microbatches" if k in results["microbatches"] else k
        wall = (f"{row[key]:.1f}" for key in ("wall_ms", "wall_min_ms", "wall_max_ms"))
        cpu = " + ".join(f"{value:.1f}" for value in row["cpu_ms"])
        faults = " + ".join(f"{value:.0f}" for value in row["page_faults"])
        table.add_row(label, *wall, cpu, faults, *speed(summary, k), f"{row['last_loss']:.5f}")
    console.print(table)
    table = Table("ratio of wall times", title=f"{name}: ratios within a round")
    for head in ("median", "min", "max"):
        table.add_column(head, justify="right")
    for k, row in results["ratios"].items():
        table.add_row(k, *(f"{row[key]:.2f}" for key in ("median", "min", "max")))
    console.print(table)
    for k, row in results["sweep"].items():
        print(f"{name}, {k}: " + ", ".join(f"{n} microbatches {ms:.1f} ms" for n, ms in row.items()))


class Clock:
    """Wall seconds, CPU seconds and page faults of named pieces of work, round by round."""

    def __init__(self) -> None:
        self.laps: dict[str, list[tuple[float, float, int]]] = {}

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """Do it and note how long it took."""
        faults, cpu, start = page_faults(), process_time(), perf_counter()
        result = work()
        end, cpu_end = perf_counter(), process_time()
        self.laps.setdefault(name, []).append((end - start, cpu_end - cpu, page_faults() - faults))
        return result

    def typical(self, warm_up: int = 2) -> dict[str, dict[str, float]]:
        """Medians without the first rounds."""
        result = {}
        for name, laps in self.laps.items():
            wall, cpu, faults = (median(values) for values in zip(*laps[warm_up:], strict=True))
            result[name] = {"wall_ms": 1e3 * wall, "cpu_ms": 1e3 * cpu, "page_faults": faults}
        return result


class Cut:
    """Two stages with a cut at ``position``, which train as `DNI` does, in one process and without Lightning."""

    def __init__(self, case: Case, position: int, diary: Clock) -> None:
        spec, module = case.spec, case.dni()
        module.cuts = [0, position, spec.total_steps]
        self.diary, self.position, self.time = diary, position, module.time(0)
        self.first, self.second = Stage(spec, 0, position), Stage(spec, position)
        self.estimator: Any = module.make_estimator(0)
        self.estimator.optimizer = make_optimizer(ADAM, self.estimator.parameters())
        self.optimizers = [make_optimizer(ADAM, stage.parameters()) for stage in (self.first, self.second)]
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


def profile_cuts(case: Case, batches: list[Batch], rounds: int, around: int) -> dict[int, dict[str, Any]]:
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
            "predicted": case.spec.stage_work([0, p, steps], case.dni().extra_cost()),
        }
        for p in positions
    }


def profile_parts(case: Case, batches: list[Batch], rounds: int) -> dict[str, dict[str, float]]:
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
    counted = counted_work(case, position)
    for name in {*parts} & {*counted}:
        parts[name]["work"] = counted[name] * case.batch
        # What the cost model's count would have to be multiplied by.
        parts[name]["factor"] = parts[name]["cpu_ms"] / counted[name] * counted["step"] / step["cpu_ms"]
    return parts


def boundary(cut: Cut, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """State and true gradient at a cut, as they lie in memory."""
    state = cut.first(x).detach().requires_grad_()
    F.cross_entropy(cut.second(state), y, reduction="sum").backward()
    assert state.grad is not None
    return state.detach(), state.grad


def counted_work(case: Case, position: int) -> dict[str, float]:
    """What the cost model counts for the parts, per sample: forward and backward are three passes."""
    spec = case.spec
    steps = spec.step_work()
    step = steps[spec.total_steps // 2]
    # The model's own count for an estimator is in units of 3 passes: one prediction, and one lesson.
    prediction = case.dni().extra_cost()(spec.state_shape(position)) * 3 / 4  # type: ignore[operator]
    return {
        "opening": 3 * (steps[0] - step),
        "step": 3 * step,
        "classifier, loss": 3 * (steps[-1] - step),
        "estimate": prediction,
        "learn": 3 * prediction,
    }


def show_profile(name: str, case: Case, parts: dict[str, Any], cuts: dict[int, Any]) -> None:
    """Two tables."""
    console = Console(width=150)
    table = Table("part", title=f"{name}: parts, forward + backward, batch {case.batch}, medians")
    for head in ("wall ms", "CPU ms", "page faults", "10^6 of work", "measured / counted"):
        table.add_column(head, justify="right")
    for part, t in parts.items():
        row = [f"{t['wall_ms']:.3f}", f"{t['cpu_ms']:.3f}", f"{t['page_faults']:.0f}"]
        table.add_row(part, *row, *([f"{t['work'] / 1e6:.1f}", f"{t['factor']:.2f}"] if "work" in t else []))
    console.print(table)
    table = Table(title=f"{name}: both stages by cut, CPU ms, medians (* chosen by the cost model)")
    short = ("0 fwd", "0 est", "0 bwd", "0 upd", "0 learn", "1 fwd", "1 bwd", "1 upd")
    for head in ("cut", *short, "stage 0", "stage 1", "0 / 1", "counted", "slowest", "copy", "faults"):
        table.add_column(head, justify="right", no_wrap=True)
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
            f"{sum(row['phases'][phase]['page_faults'] for phase in PHASES):.0f}",
        )
    console.print(table)


def profile(name: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The costs of all parts and cuts, one thread."""
    torch.set_num_threads(1)
    batches, rounds = pool(case, options.raw_dir), options.rounds or 30
    parts = profile_parts(case, batches, rounds)
    cuts = profile_cuts(case, batches, rounds, options.around)
    show_profile(name, case, parts, cuts)
    return {"parts": parts, "cuts": cuts}


def machine() -> dict[str, Any]:
    """What was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{k: v for k, v in os.environ.items() if k.startswith(("OMP_", "MKL_", "MALLOC_"))},
    }


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
    add("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure, print tables, and write JSON if asked to."""
    options = arguments()
    facts, data = machine(), "MNIST" if has_mnist(options.raw_dir) else "random numbers"
    print(*(f"{key} {value}" for key, value in facts.items()), f"data {data}", sep=", ")
    results: dict[str, Any] = {"machine": facts, "data": data, "options": vars(options), "networks": {}}
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    multiprocessing.set_forkserver_preload(["torch", "pytorch_lightning", "baselines"])
    for name in (name for name in CASES if options.network in (name, "both")):
        if options.profile:
            results["networks"][name] = profile(name, CASES[name], options)
        else:
            results["networks"][name] = compare(name, CASES[name], options, partial(print, file=sys.stderr))
            show(name, CASES[name], results["networks"][name])
        results["load_at_the_end"] = os.getloadavg()[0]
        if options.json:
            options.json.write_text(json.dumps(results, indent=2, default=str))
    print(f"load at the end {results['load_at_the_end']:.2f}")


if __name__ == "__main__":
    main()
