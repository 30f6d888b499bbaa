"""All contenders of `stages.py` in turn, round by round, and what is computed from the rounds."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

from cases import TRUE_GRADIENT
from timing import Length, by_name, in_turn, ratios, spread
from trees import Tree

MEASUREMENT_S = 5.0
# True gradients: the first losses have to agree.
COMPARED_LOSSES, TOLERANCE = 5, 1e-3

# One measurement of a contender: wall and CPU milliseconds a batch, losses, and all that is raw.
Measured = dict[str, Any]
Tell = Callable[[str], Any]


class Runner:
    """Measures the contenders of a source tree on one network."""

    def __init__(self, network: str, options: argparse.Namespace, tree: Tree) -> None:
        self.network, self.options, self.tree = network, vars(options), tree
        self.known: dict[str, dict[str, Any]] = tree.call("contenders:describe", network, self.options)

    def measure(self, name: str, length: Length, microbatches: int | None = None) -> Measured:
        """Train once."""
        args = (self.network, name, microbatches, asdict(length), self.options)
        processes = self.tree.call("contenders:measure", *args)
        trees = {p["tree"] for p in processes}
        assert trees == {str(self.tree.path)}, f"{name} was measured in {trees}, not in {self.tree.path}"
        losses = [p["losses"] for p in processes if p["losses"]]
        ends = max(p["end"] for p in processes) - min(p["start"] for p in processes)
        return {
            "wall_ms": 1e3 * max(p["end"] - p["start"] for p in processes) / length.measured,
            "wall_with_ends_ms": 1e3 * ends / length.measured,
            "cpu_ms": [1e3 * p["cpu_s"] / length.measured for p in processes],
            "page_faults": [p["page_faults"] / length.measured for p in processes],
            # Of a batch that was halved each process knows the mean of its half.
            "losses": [sum(values) / len(values) for values in zip(*losses, strict=True)],
            "processes": processes,
            "load": os.getloadavg()[0],
        }


def compare(
    network: str, options: argparse.Namespace, this: Tree, other: Tree | None, tell: Tell
) -> dict[str, Any]:
    """Measure the contenders of this tree, each with the same one of the other tree if there is one, in turn."""
    runner = Runner(network, options, this)
    names = chosen(runner.known, options.only)
    length = calibrate(runner, options.batches)
    swept = sweep(runner, [name for name in names if runner.known[name]["microbatches"]], length, tell)
    best = {name: min(row, key=lambda n: row[n]) for name, row in swept.items()}
    runs, groups = dict[str, Callable[[], Measured]](), dict[str, tuple[str, str]]()
    runners = [runner, *([Runner(network, options, other)] if other else [])]
    for name in names:
        for each in runners:
            if name in each.known:
                label = name if each is runner else other_label(name, each.tree)
                runs[label] = partial(each.measure, name, length, best.get(name))
                groups[label] = str(each.tree.path), each.known[name]["same_losses"]
    rounds = []
    for measured in in_turn(runs, options.rounds or 7):
        rounds.append(measured)
        walls = ", ".join(f"{label} {m['wall_ms']:.1f}" for label, m in measured.items())
        tell(f"{network}, round {len(rounds)}: {walls}")
        check_losses(measured, groups)
    return {
        "length": asdict(length),
        "sweep": swept,
        "microbatches": best,
        "summary": summarise(rounds),
        "ratios": wall_ratios(rounds, names),
        "trees": between_trees(rounds, names, other) if other else {},
        "rounds": rounds,
    }


def chosen(known: Mapping[str, Any], only: list[str] | None) -> list[str]:
    """The names to compare, in the order of the table."""
    if unknown := {*(only or ())} - {*known}:
        raise SystemExit(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [name for name in known if not only or name in only]


def other_label(name: str, tree: Tree) -> str:
    """What a contender of the other tree is called."""
    return f"{name} @{tree.name}"


def calibrate(runner: Runner, batches: int | None) -> Length:
    """The length of a measurement, the same for all contenders."""
    if batches:
        return Length(batches)
    ms = runner.measure("bare", Length(3, warm_up=2, cool_down=0))["wall_ms"]
    return Length(max(8, round(MEASUREMENT_S / (ms / 1e3))))


def sweep(runner: Runner, names: list[str], length: Length, tell: Tell) -> dict[str, dict[int, float]]:
    """Wall ms a batch of pipelines by number of microbatches; half the batches, the better of two."""
    short = Length(max(length.measured // 2, 4), length.warm_up, length.cool_down)

    def run(name: str, n: int) -> float:
        ms: float = runner.measure(name, short, n)["wall_ms"]
        tell(f"sweep: {name}, {n} microbatches: {ms:.1f} ms")
        return ms

    pairs = [(name, n) for name in names for n in runner.known[name]["microbatches"]]
    times = by_name(in_turn({pair: partial(run, *pair) for pair in pairs}, 2))
    return {name: {n: min(times[name, n]) for n in runner.known[name]["microbatches"]} for name in names}


def check_losses(measured: Mapping[str, Measured], groups: Mapping[str, tuple[str, str]]) -> None:
    """Contenders of the same group have the same losses.

    Args:
        groups: the tree of each and its `Contender.same_losses`.

    Raises:
        AssertionError: if they differ.
    """
    first: dict[tuple[str, str], str] = {}
    for label, group in groups.items():
        if group[1]:
            other = first.setdefault(group, label)
            a, b = measured[label]["losses"], measured[other]["losses"]
            assert are_alike(a, b, group[1]), f"losses of {label}: {a}, not {b} as of {other}"


def are_alike(a: list[float], b: list[float], group: str) -> bool:
    """Whether losses are the same, or for the true gradient the first ones nearly so."""
    if group != TRUE_GRADIENT:
        return a == b
    pairs = zip(a[:COMPARED_LOSSES], b[:COMPARED_LOSSES], strict=True)
    return all(math.isclose(x, y, rel_tol=TOLERANCE) for x, y in pairs)


def summarise(rounds: list[dict[str, Measured]]) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, by contender."""

    def by_process(name: str, key: str) -> list[float]:
        return [median(values) for values in zip(*(r[name][key] for r in rounds), strict=True)]

    result = {}
    for name in rounds[0]:
        wall = spread([r[name]["wall_ms"] for r in rounds])
        result[name] = {
            "wall_ms": wall["median"],
            "wall_min_ms": wall["min"],
            "wall_max_ms": wall["max"],
            "cpu_ms": by_process(name, "cpu_ms"),
            "page_faults": by_process(name, "page_faults"),
            "last_loss": rounds[-1][name]["losses"][-1],
        }
    return result


def wall_ratios(rounds: list[dict[str, Measured]], names: list[str]) -> dict[str, dict[str, float]]:
    """Ratios of wall times within a round: all to each dni on several workers with lag 1, and a few more."""
    quick = [name for name in names if name.startswith("dni") and name.endswith("lag1")]
    pairs = [(name, fast) for fast in quick for name in names if name != fast]
    more = (
        ("backprop", "bare"),
        ("bare", "bare-2t"),
        ("bare", "ddp"),
        ("replicas-2", "ddp"),
        ("delayed-m2", "delayed-1x2"),
    )
    pairs += [(a, b) for a, b in more if {a, b} <= {*names}]
    wall = by_name({name: m["wall_ms"] for name, m in r.items()} for r in rounds)
    return {f"{a} / {b}": spread(ratios(wall[a], wall[b])) for a, b in pairs}


def between_trees(rounds: list[dict[str, Measured]], names: list[str], other: Tree) -> dict[str, Any]:
    """Ratios of the other tree to this one within a round, of contenders that both have: above 1 this one is faster.

    Of wall time, of CPU time summed over processes, and the medians of that of each process.
    """
    result = {}
    for name in names:
        label = other_label(name, other)
        if label in rounds[0]:
            by_process = [ratios(r[label]["cpu_ms"], r[name]["cpu_ms"]) for r in rounds]
            result[name] = {
                "wall": spread([r[label]["wall_ms"] / r[name]["wall_ms"] for r in rounds]),
                "cpu": spread([sum(r[label]["cpu_ms"]) / sum(r[name]["cpu_ms"]) for r in rounds]),
                "cpu_by_process": [median(values) for values in zip(*by_process, strict=True)],
            }
    return result
