"""The comparison as text: terminal, Markdown, CSV."""

import csv
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from sglight.report.groups import tasks
from sglight.report.measures import compare
from sglight.report.runs import Run
from sglight.report.tables import markdown, print_tables, to_csv
from tests.report.common import results
from tests.report.test_groups import run


def sweep() -> list[Run]:
    numbers = {k: v for k, v in results().items() if isinstance(v, float | int)}
    runs = [
        replace(run(strategy=s, seed=seed, model__steps=n), metrics={**numbers, "test/acc": 0.9 + seed / 100})
        for s in ("backprop", "dni") for n in (4, 8) for seed in (1, 2)
    ]  # fmt: skip
    return [*runs[:-1], replace(runs[-1], state="failed", reason="UserError: [bold] | no", metrics={})]


def printed(runs: list[Run], width: int, terminal: bool = True) -> str:
    console = Console(file=StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_tables([compare(task) for task in tasks(runs)], runs, console)
    return console.file.getvalue()


def test_a_wide_terminal_shows_one_table():
    text = printed(sweep(), 250)
    assert text.count("strategy") == 1
    assert "91.50 ± 0.71 %" in text and "1 finished, 1 failed" in text
    assert "failed: a: UserError: [bold] | no" in text


@pytest.mark.parametrize("width", [70, 100])
def test_a_narrow_terminal_shows_all_columns_in_several_tables(width):
    table = printed(sweep()[:-1], width)
    assert max(map(len, table.splitlines())) <= width
    assert table.count("strategy") > 1
    for word in ("accuracy", "training", "epoch", "parameters", "memory", "91.50 %", "± 0.71", "38.1 k"):
        assert word in table
    assert "…" not in table


def test_a_pipe_gets_one_table_unbroken():
    assert printed(sweep(), 80, terminal=False).count("strategy") == 1


def test_markdown_has_as_many_cells_in_every_row():
    runs = sweep()
    rows = [
        line
        for line in markdown([compare(task) for task in tasks(runs)]).splitlines()
        if line.startswith("|")
    ]
    assert len(rows) == 2 + 4
    assert "\n\nMost accurate is " in markdown([compare(task) for task in tasks(runs)])
    assert len({row.count("|") for row in rows}) == 1
    assert rows[0].startswith("| strategy | steps | runs | test accuracy |")
    assert rows[2].startswith("| backprop | 4 | 2 | 91.50 ± 0.71 % |")


def test_csv_has_a_row_for_each_run_and_all_numbers():
    runs = sweep()
    rows = list(csv.DictReader(StringIO(to_csv([compare(task) for task in tasks(runs)], runs))))
    assert len(rows) == len(runs)
    for row, each in zip(rows, runs, strict=True):
        assert (row["state"], row["reason"], row["seed"]) == (each.state, each.reason, str(each.seed))
        assert row["model.steps"] == str(each.config["model.steps"])
        assert {k: float(row[k]) for k in each.metrics} == dict(each.metrics)
    assert rows[0]["setting"] == "backprop · steps 4"
