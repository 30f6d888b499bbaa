"""The tables that `stages.py` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

SPREAD = ("median", "min", "max")
PHASES = {
    "0 fwd": "0 forward", "0 est": "0 estimate", "0 bwd": "0 backward", "0 upd": "0 update", "0 learn": "0 learn",
    "1 fwd": "1 forward", "1 bwd": "1 backward", "1 upd": "1 update",
}  # fmt: skip


def right_aligned(table: Table, *heads: str, no_wrap: bool = False) -> Table:
    """The table with further columns of numbers."""
    for head in heads:
        table.add_column(head, justify="right", no_wrap=no_wrap)
    return table


def show_comparison(network: str, batch: int, results: Mapping[str, Any], other: str = "") -> None:
    """What `compare` found; ``other`` is the other source tree, if there is one."""
    console = Console(width=120)
    console.print(times_table(network, batch, results))
    if other:
        console.print(trees_table(network, results["trees"], other))
    console.print(ratios_table(network, results["ratios"]))
    for name, row in results["sweep"].items():
        print(f"{network}, {name}: " + ", ".join(f"{n} microbatches {ms:.1f} ms" for n, ms in row.items()))


def times_table(network: str, batch: int, results: Mapping[str, Any]) -> Table:
    """A row for each contender."""
    rounds, length = len(results["rounds"]), results["length"]["measured"]
    table = Table("method", title=f"{network}: ms a batch of {batch}, {rounds} rounds of {length} batches")
    right_aligned(
        table, "wall, median", "min", "max", "CPU by process", "page faults", "dni-1 / it", "by CPU"
    )
    right_aligned(table, "last loss")
    summary, microbatches = results["summary"], results["microbatches"]
    for name, row in summary.items():
        label = f"{name}, {microbatches[name]} microbatches" if name in microbatches else name
        wall = (f"{row[key]:.1f}" for key in ("wall_ms", "wall_min_ms", "wall_max_ms"))
        cpu = " + ".join(f"{value:.1f}" for value in row["cpu_ms"])
        faults = " + ".join(f"{value:.0f}" for value in row["page_faults"])
        table.add_row(label, *wall, cpu, faults, *speed(summary, name), f"{row['last_loss']:.5f}")
    return table


def speed(summary: Mapping[str, Mapping[str, Any]], name: str) -> tuple[str, str]:
    """How many times faster than dni-1: by wall time, and by the CPU time of the busiest process."""
    if "dni-1" not in summary:
        return "", ""
    one, it = summary["dni-1"], summary[name]
    return f"{one['wall_ms'] / it['wall_ms']:.2f}", f"{max(one['cpu_ms']) / max(it['cpu_ms']):.2f}"


def ratios_table(network: str, ratios: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each pair of contenders."""
    table = Table("ratio of wall times", title=f"{network}: ratios within a round")
    right_aligned(table, *SPREAD)
    for name, row in ratios.items():
        table.add_row(name, *(f"{row[key]:.2f}" for key in SPREAD))
    return table


def trees_table(network: str, ratios: Mapping[str, Mapping[str, Any]], other: str) -> Table:
    """A row for each contender that both source trees have."""
    table = Table(
        "method", title=f"{network}: {other} / this tree within a round, above 1: this tree is faster"
    )
    right_aligned(table, "wall, median", "min", "max", "CPU, median", "min", "max", "CPU by process")
    for name, row in ratios.items():
        cells = (f"{row[kind][key]:.3f}" for kind in ("wall", "cpu") for key in SPREAD)
        table.add_row(name, *cells, ", ".join(f"{value:.3f}" for value in row["cpu_by_process"]))
    return table


def show_costs(network: str, batch: int, costs: Mapping[str, Any]) -> None:
    """What `stage_costs.profile` found."""
    console = Console(width=150)
    console.print(parts_table(network, batch, costs["parts"]))
    console.print(cuts_table(network, costs["cuts"]))


def parts_table(network: str, batch: int, parts: Mapping[str, Mapping[str, float]]) -> Table:
    """A row for each part of the network."""
    table = Table("part", title=f"{network}: parts, forward + backward, batch {batch}, medians")
    right_aligned(table, "wall ms", "CPU ms", "page faults", "10^6 of work", "measured / counted")
    for name, t in parts.items():
        row = [f"{t['wall_ms']:.3f}", f"{t['cpu_ms']:.3f}", f"{t['page_faults']:.0f}"]
        table.add_row(name, *row, *([f"{t['work'] / 1e6:.1f}", f"{t['factor']:.2f}"] if "work" in t else []))
    return table


def cuts_table(network: str, cuts: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each cut."""
    table = Table(title=f"{network}: both stages by cut, CPU ms, medians (* chosen by the cost model)")
    totals = ("stage 0", "stage 1", "0 / 1", "counted", "slowest", "copy", "faults")
    right_aligned(table, "cut", *PHASES, *totals, no_wrap=True)
    for position, row in cuts.items():
        phases = row["phases"]
        cells = {name: phases[name]["cpu_ms"] for name in PHASES.values()}
        first, second = (sum(ms for name, ms in cells.items() if name[0] == stage) for stage in "01")
        table.add_row(
            f"{position}{'*' if row['chosen'] else ''}",
            *(f"{ms:.2f}" for ms in (*cells.values(), first, second)),
            f"{first / second:.2f}",
            f"{row['predicted'][0] / row['predicted'][1]:.2f}",
            f"{max(first, second):.2f}",
            f"{phases['copy']['cpu_ms']:.2f}",
            f"{sum(phases[name]['page_faults'] for name in cells):.0f}",
        )
    return table
