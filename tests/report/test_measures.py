"""Statistics against an independent computation, targets and speed-ups against their definitions."""

from dataclasses import replace

import numpy as np
import pytest

from sglight.report.events import Curve
from sglight.report.groups import Task, tasks
from sglight.report.measures import (
    ALONE,
    BACKPROP,
    MEASURES,
    SAVED,
    TARGET,
    Comparison,
    Statistic,
    compare,
    default_target,
    time_to,
)
from sglight.report.runs import Run
from tests.report.test_groups import run as configured

RATE = "throughput/samples_per_s"
BY_KEY = {measure.key: measure for measure in MEASURES}


def run(metrics: dict[str, float] | None = None, accuracies: tuple[float, ...] = (), **keys) -> Run:
    """A finished run that validates every 2 s."""
    n = len(accuracies)
    curve = Curve(np.arange(n) * 10.0, 2.0 * np.arange(1, n + 1), np.array(accuracies))
    curves = {"val/acc": curve} if n else {}
    return replace(configured(**keys), metrics=metrics or {}, curves=curves)


def only(runs: list[Run], **options):
    (task,) = tasks(runs)
    return compare(task, **options)


def test_mean_and_deviation_are_those_of_the_finished_runs():
    accuracies = [0.90, 0.94, 0.95]
    runs = [run({"test/acc": acc}, seed=seed) for seed, acc in enumerate(accuracies)]
    runs.append(replace(run({"test/acc": 0.1}, seed=9), state="diverged"))
    (row,) = only(runs).rows
    found = row["test/acc"]
    assert found.mean == pytest.approx(np.mean(accuracies))
    assert found.std == pytest.approx(np.std(accuracies, ddof=1))
    assert (found.n, found.of) == (3, 3)


def test_one_run_has_no_deviation_and_what_nobody_has_no_column():
    comparison = only([run({"test/acc": 0.9})])
    assert comparison.rows[0]["test/acc"].std is None
    assert [measure.key for measure in comparison.measures] == ["test/acc"]
    assert BY_KEY["test/acc"].text(comparison.rows[0]["test/acc"]) == "90.00 %"
    assert BY_KEY["test/acc"].text(None) == "–"


def test_a_value_that_some_runs_lack_says_how_many_have_it():
    runs = [run({"test/acc": 0.9}, seed=1), run({"test/acc": 0.9}, seed=2), run({}, seed=3)]
    (row,) = only(runs).rows
    assert BY_KEY["test/acc"].text(row["test/acc"]) == "90.00 ± 0.00 % (2 of 3)"
    assert BY_KEY["test/acc"].halves(row["test/acc"]) == ("90.00 %", "± 0.00 (2 of 3)")


def test_the_default_target_is_99_percent_of_the_worst_contender():
    def group(strategy: str, *accs: float) -> list[Run]:
        return [run({"val/acc": a}, strategy=strategy, seed=i) for i, a in enumerate(accs)]

    runs = [*group("a", 0.98, 0.96), *group("b", 0.92, 0.90), *group("c", 0.3)]
    (task,) = tasks(runs)
    assert default_target(task.groups) == pytest.approx(0.99 * 0.91)
    assert default_target(task.groups[2:]) == pytest.approx(0.99 * 0.3)
    assert default_target([]) is None


def test_time_to_target_is_the_first_validation_that_reaches_it():
    one = run(accuracies=(0.5, 0.8, 0.7, 0.9))
    assert time_to(one, 0.8) == 4.0
    assert time_to(one, 0.85) == 8.0
    assert time_to(one, 0.95) is None
    assert time_to(run(), 0.5) is None
    level = Curve(np.arange(4) * 10.0, np.arange(4.0), np.array([0.0, 0.0, 1.0, 1.0]))
    assert time_to(replace(one, curves={**one.curves, "level": level}), 0.8) == 8.0
    clockless = Curve(np.array([1.0]), np.array([np.nan]), np.array([0.9]))
    assert time_to(replace(one, curves={"val/acc": clockless}), 0.5) is None


def test_who_never_reaches_the_target_is_told_and_not_averaged_in():
    runs = [run(accuracies=accs, seed=i) for i, accs in enumerate([(0.8, 0.9), (0.9,), (0.8, 0.8)])]
    (row,) = only(runs, target=0.9).rows
    assert (row[TARGET].mean, row[TARGET].n, row[TARGET].of) == (3.0, 2, 3)


def test_speed_ups_are_ratios_of_mean_throughput():
    rates = {("backprop", 1): 1000.0, ("dni", 1): 800.0, ("dni", 2): 1500.0}
    runs = [
        run({RATE: rate + 10 * seed}, strategy=strategy, trainer__devices=devices, seed=seed)
        for (strategy, devices), rate in rates.items()
        for seed in (-1, 1)
    ]
    comparison = only(runs)
    rows = {(g.columns["strategy"], g.columns["trainer.devices"]): row for g, row in
            zip(comparison.task.groups, comparison.rows, strict=True)}  # fmt: skip
    assert rows["dni", 2][ALONE].mean == pytest.approx(1500 / 800)
    assert rows["dni", 2][BACKPROP].mean == pytest.approx(1.5)
    assert rows["dni", 1][BACKPROP].mean == pytest.approx(0.8)
    assert ALONE not in rows["dni", 1] and not {ALONE, BACKPROP} & rows["backprop", 1].keys()


def test_replicas_are_compared_with_one_worker():
    one = run({RATE: 1000.0}, trainer__devices=1, trainer__replicas=1, trainer__layout="pipelines")
    two = run({RATE: 1900.0}, trainer__devices=2, trainer__replicas=2, trainer__layout="replicas")
    comparison = only([one, two])
    row = next(r for g, r in zip(comparison.task.groups, comparison.rows, strict=True) if g.runs[0] is two)
    assert row[ALONE].mean == pytest.approx(1.9)


def test_a_speed_up_is_against_the_same_network_and_the_nearest_config():
    other = run({RATE: 1.0}, model__steps=99, trainer__max_epochs=7)
    far = run({RATE: 10.0}, trainer__max_epochs=7, strategy__optimizer={"lr": 0.5})
    near = run({RATE: 100.0}, trainer__max_epochs=7)
    one = run({RATE: 200.0}, strategy="dni", trainer__max_epochs=7)
    comparison = only([other, far, near, one])
    row = next(r for g, r in zip(comparison.task.groups, comparison.rows, strict=True) if g.runs[0] is one)
    assert row[BACKPROP].mean == 2.0
    alone = only([other, one])
    assert BACKPROP not in alone.rows[1] and "No speed-up over backprop for dni" in alone.note
    measured = only([other, run({RATE: 200.0, BACKPROP: 0.5}, strategy="dni", trainer__max_epochs=7)])
    assert measured.rows[1][BACKPROP].mean == 0.5 and not measured.note  # by a run that is not among these
    elsewhere = only([replace(near, machine="another"), replace(one, machine="this")])
    assert BACKPROP not in elsewhere.rows[1] and not comparison.note


def test_a_speed_up_is_not_against_backprop_whose_stages_take_turns():
    plain, turns = run({RATE: 100.0}, strategy__stages=1), run({RATE: 10.0}, strategy__stages=4)
    one = run({RATE: 50.0}, strategy="dni", strategy__stages=4)
    comparison = only([plain, turns, one])
    row = next(r for g, r in zip(comparison.task.groups, comparison.rows, strict=True) if g.runs[0] is one)
    assert row[BACKPROP].mean == 0.5
    assert "strategy.stages=1" in only([turns, one]).note


def test_what_by_puts_together_keeps_its_speed_up():
    rates = {("backprop", 4): 100.0, ("backprop", 8): 50.0, ("dni", 4): 150.0, ("dni", 8): 100.0}
    runs = [run({RATE: rate}, strategy=s, model__steps=steps) for (s, steps), rate in rates.items()]
    (task,) = tasks(runs, ["strategy"])
    rows = compare(task).rows
    assert rows[1][BACKPROP].mean == pytest.approx((1.5 + 2.0) / 2)
    assert BACKPROP not in rows[0]


def test_saved_is_against_one_level_with_the_same_config():
    def of(levels: int, time: float, steps: int = 8) -> Run:
        strategy = {"levels": levels, "level": {"epochs": [2] * levels}}
        keys = {f"strategy__{key}": value for key, value in strategy.items()}
        return run({"time/fit_s": time}, strategy="multilevel", model__steps=steps, **keys)

    comparison = only([of(1, 10.0), of(2, 8.0), of(3, 5.0), of(1, 1.0, steps=4), of(2, 7.0, steps=16)])
    saved = {
        (g.runs[0].config["model.steps"], g.runs[0].config["strategy.levels"]): row.get(SAVED)
        for g, row in zip(comparison.task.groups, comparison.rows, strict=True)
    }
    assert saved[8, 2].mean == pytest.approx(0.2) and saved[8, 3].mean == pytest.approx(0.5)
    assert [saved[key] for key in ((8, 1), (4, 1), (16, 2))] == [None] * 3


def test_the_best_of_a_measure():
    runs = [
        run({"test/acc": a, "time/fit_s": a, "model/parameters": a}, model__steps=i)
        for i, a in enumerate((1, 3, 2))
    ]
    comparison = only(runs)
    best = {key: [comparison.is_best(i, BY_KEY[key]) for i in range(3)] for key in comparison.rows[0]}
    assert best["test/acc"] == [False, True, False]
    assert best["time/fit_s"] == [True, False, False]
    assert best["model/parameters"] == [False] * 3
    assert only(runs[:1]).best(BY_KEY["test/acc"]) is None


def test_no_speed_up_below_one_is_marked_as_the_best() -> None:
    measure = next(m for m in MEASURES if m.key == "speedup/backprop")
    for factors, best in (((0.5, 0.7), [False, False]), ((0.5, 1.2), [False, True])):
        rows = [{measure.key: Statistic(factor, None, 1, 1)} for factor in factors]
        comparison = Comparison(Task("digits", []), None, rows)
        assert [comparison.is_best(i, measure) for i in range(2)] == best
