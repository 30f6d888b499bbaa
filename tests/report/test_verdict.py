"""The verdict names who is best, at which price, and why a strategy loses: from the figures of the runs alone."""

from dataclasses import replace

import numpy as np

from sglight.report.events import Curve
from sglight.report.groups import tasks
from sglight.report.measures import compare
from sglight.report.runs import Run
from sglight.report.verdict import verdict
from tests.report.test_measures import run

RATE = "throughput/samples_per_s"


def told(*runs: Run, target: float | None = None) -> str:
    (task,) = tasks(runs)
    return verdict(compare(task, target))


def trained(
    strategy: str, acc: float, fit_s: float, accuracies: tuple[float, ...], rate: float, **more
) -> Run:
    metrics = {"test/acc": acc, "time/fit_s": fit_s, RATE: rate, **more}
    return run(metrics, accuracies, strategy=strategy)


def test_backprop_wins_and_the_loser_is_diagnosed():
    times = {"time/stage_0/forward_s": 3.0, "time/stage_0/backward_s": 5.0, "time/stage_0/estimate_s": 2.0}
    dni = trained("dni", 0.94, 12.0, (0.6, 0.7, 0.9), 80.0, **times)
    zeros, ends = np.zeros(2), (0.57, 1.0)
    cosine = {f"stage_{i}/cosine": Curve(zeros, zeros, np.array([0.1, c])) for i, c in enumerate(ends)}
    dni = replace(dni, curves={**dni.curves, **cosine})
    text = told(trained("backprop", 0.97, 10.0, (0.7, 0.9), 100.0), dni, target=0.9)
    assert text == (
        "Most accurate is backprop with 97.00 % test accuracy. First at 90.00 % is backprop, after 4.00 s. "
        "dni is 3.00 points less accurate and 0.80 times as fast: the worst stage's gradients have a cosine of 0.57 "
        "with the exact ones, estimators take 20 % of the computing time."
    )


def test_a_strategy_that_wins_has_a_price():
    winner = trained("delayed", 0.98, 15.0, (0.9,), 120.0)
    text = told(trained("backprop", 0.97, 10.0, (0.7, 0.9), 100.0), winner, target=0.9)
    assert text == (
        "Most accurate is delayed with 98.00 % test accuracy, 1.00 points above backprop for 1.50 times its training "
        "time. First at 90.00 % is delayed, after 2.00 s, 0.50 times the time of backprop."
    )


def test_without_a_yardstick_or_a_rival_that_is_said():
    one, other = trained("dni", 0.9, 1.0, (), 1.0), trained("pvd", 0.8, 1.0, (), 1.0)
    assert "no run of strategy=backprop" in told(one, other)
    assert told(one) == "Only dni has results: there is nothing to compare it with."
    assert told(run()) == ""


def test_a_loser_without_measurements_says_so():
    text = told(trained("backprop", 0.97, 10.0, (), 100.0), trained("dni", 0.9, 1.0, (), 200.0))
    assert text.endswith("dni is 7.00 points less accurate; the diagnosis of its runs shows no reason.")


def test_the_rival_has_the_same_network():
    accuracies = {("backprop", 4): 0.97, ("backprop", 8): 0.99, ("dni", 4): 0.95, ("dni", 8): 0.9}
    runs = [run({"test/acc": acc}, strategy=s, model__steps=n) for (s, n), acc in accuracies.items()]
    assert "dni · steps 4 is 2.00 points less accurate than backprop · steps 4;" in told(*runs)


def test_a_target_that_nobody_reaches_is_named():
    runs = [
        run({"test/acc": acc, "val/acc": acc}, strategy=name)
        for name, acc in (("backprop", 0.9), ("dni", 0.8))
    ]
    assert "No run reaches 95.00 % validation accuracy." in told(*runs, target=0.95)
    assert "No run" not in told(*runs, target=0.85)


def test_what_is_within_a_deviation_is_no_loss():
    def seeds(strategy: str, *accs: float) -> list[Run]:
        return [run({"test/acc": acc, RATE: 1.0}, strategy=strategy, seed=i) for i, acc in enumerate(accs)]

    assert "less accurate" not in told(*seeds("backprop", 0.96, 0.98), *seeds("dni", 0.955, 0.975))
    assert "less accurate" in told(*seeds("backprop", 0.96, 0.98), *seeds("dni", 0.90, 0.91))
