"""The measures by which runs are compared: means and deviations over seeds, time to an accuracy, speed-ups."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from sglight import units
from sglight.report.groups import Group, Task, identity
from sglight.report.runs import Run

# The target accuracy is this part of the lowest mean of best validation accuracies,
TARGET_PART = 0.99
# among groups that reach this part of the highest one, so that a group that learns nothing does not count.
CONTENDER_PART = 0.9
NAMED = 3  # a note names so many groups and counts the others


@dataclass(frozen=True)
class Statistic:
    """The mean of a measure over runs.

    Attributes:
        mean: of the values.
        std: their sample standard deviation; None for one value.
        n: how many runs have a value,
        of: of how many runs.
    """

    mean: float
    std: float | None
    n: int
    of: int

    @property
    def part(self) -> str:
        """`` (2 of 3)`` if not all runs have the value."""
        return "" if self.n == self.of else f" ({self.n} of {self.of})"


@dataclass(frozen=True)
class Measure:
    """A column of the comparison.

    Attributes:
        key: its name in `metrics.json`.
        title: its heading.
        show: formats a mean and a deviation, with a unit.
        best: `max` or `min`, or None if neither is better.
        help: an explanation.
    """

    key: str
    title: str
    show: Callable[[float, float | None], str]
    best: Callable[[Sequence[float]], float] | None
    help: str

    @property
    def first(self) -> str:
        """The order in which the best comes first, `ascending` or `descending`; empty if neither is better."""
        return {max: "descending", min: "ascending"}.get(self.best, "")  # type: ignore[arg-type]

    def text(self, statistic: Statistic | None) -> str:
        """Mean ± deviation, and how many runs have the value if not all."""
        if statistic is None:
            return "–"
        return self.show(statistic.mean, statistic.std) + statistic.part

    def halves(self, statistic: Statistic | None) -> tuple[str, str]:
        """`text` in two parts: the mean with its unit; the deviation and how many runs have the value."""
        if statistic is None:
            return "–", ""
        text = self.show(statistic.mean, statistic.std)
        spread = re.search(r" (± [\d.]+)", text)
        if spread is None:
            return text, statistic.part
        return text.replace(spread[0], ""), spread[1] + statistic.part


TARGET, SAVED = "time/to_target_s", "time/saved"
ALONE, BACKPROP = "speedup/one_worker", "speedup/backprop"
RATE, FIT = "throughput/samples_per_s", "time/fit_s"

MEASURES = (
    Measure("test/acc", "test accuracy", units.percent, max, "of the checkpoint with the best validation"),
    Measure("val/acc", "valid. accuracy", units.percent, max, "of the best epoch"),
    Measure(
        TARGET, "time to target", units.seconds, min,
        "from the first record of the training to the end of the first validation whose accuracy reaches the "
        "target, over the runs that reach it",
    ),
    Measure("time/fit_s", "training", units.seconds, min, "the whole training, with validation and files"),
    Measure("time/cpu_s", "CPU time", units.seconds, min, "seconds of the processors of all workers in the training"),
    Measure(
        SAVED, "saved by levels", units.percent, max,
        "part of the training's time that is less than with strategy.levels=1 and the same config otherwise",
    ),
    Measure("time/epoch_s", "epoch", units.seconds, min, "median over the epochs, training batches only"),
    Measure(
        "throughput/samples_per_s", "samples\N{NO-BREAK SPACE}/\N{NO-BREAK SPACE}s", units.count, max,
        "median over the epochs",
    ),
    Measure(
        ALONE, "speed-up over one worker", units.ratio, max,
        "samples a second over those of the same config with trainer.devices=1",
    ),
    Measure(
        BACKPROP, "speed-up over backprop", units.ratio, max,
        "measured: samples a second over those of strategy=backprop in one stage on one worker with the same data, "
        "network and machine (if several: of the config that differs least)",
    ),
    Measure(
        "speedup/theoretical", "ideal speed-up over itself", units.ratio, None,
        "what a worker for each stage would gain over one worker that does the same, by the measured times of its "
        "phases; not over backprop",
    ),
    Measure(
        "memory/peak_bytes", "peak memory", units.size, None,
        "growth over the run's start, libraries not included, of the worker that took the most",
    ),
    Measure("model/parameters", "parameters", units.count, None, "of the network, without estimators"),
)  # fmt: skip

Row = Mapping[str, Statistic]


@dataclass(frozen=True)
class Comparison:
    """The groups of a task with their statistics.

    Attributes:
        task: has the groups.
        target: the validation accuracy for the time to target; None if there is none.
        rows: for each group, its statistics by measure, as far as its runs have values.
        unmeasured: the groups whose speed has been compared with no run of backpropagation, now or when they ended.
    """

    task: Task
    target: float | None
    rows: Sequence[Row]
    unmeasured: Sequence[Group] = ()

    @property
    def note(self) -> str:
        """Why some groups have no speed-up over backprop; empty if all have."""
        if not self.unmeasured:
            return ""
        names = ", ".join(group.label for group in self.unmeasured[:NAMED])
        more = f" and {len(self.unmeasured) - NAMED} more" if len(self.unmeasured) > NAMED else ""
        return (
            f"No speed-up over backprop for {names}{more}: no finished run of strategy=backprop with strategy.stages=1 "
            "and trainer.devices=1 has the same data and network on the same machine."
        )

    @property
    def measures(self) -> list[Measure]:
        """The measures that at least one group has."""
        return [measure for measure in MEASURES if any(measure.key in row for row in self.rows)]

    def best(self, measure: Measure) -> float | None:
        """The best mean of a measure; None if no value is better than another."""
        found = [row[measure.key] for row in self.rows if measure.key in row]
        if measure.key == TARGET and any(each.n == each.of for each in found):
            found = [each for each in found if each.n == each.of]  # groups that reach it with every seed
        means = [each.mean for each in found]
        return measure.best(means) if measure.best is not None and len(set(means)) > 1 else None

    def is_best(self, i: int, measure: Measure) -> bool:
        """Whether group i has the best mean of a measure; speed-ups below 1 are never the best."""
        statistic = self.rows[i].get(measure.key)
        if statistic is not None and measure.key.startswith("speedup/") and statistic.mean < 1:
            return False
        return statistic is not None and statistic.mean == self.best(measure)


def compare(task: Task, target: float | None = None) -> Comparison:
    """The statistics of all groups of a task.

    Args:
        task: has the groups.
        target: the validation accuracy for the time to target; None for `default_target`.
    """
    target = default_target(task.groups) if target is None else target
    rows = [_statistics(group, target) for group in task.groups]
    yardsticks = [Yardstick(run) for group in task.groups for run in group.finished if is_yardstick(run)]
    unmeasured = []
    for group, row in zip(task.groups, rows, strict=True):
        if ratios := over_backprop(group.finished, yardsticks):
            row[BACKPROP] = statistic(ratios, len(group.finished))
        elif (
            BACKPROP not in row
            and RATE in row
            and any(run.config["strategy"] != "backprop" for run in group.finished)
        ):
            unmeasured.append(group)
        for key, reference, of, value in (
            (ALONE, _one_worker(group, task.groups), RATE, float),
            (SAVED, _one_level(group, task.groups), FIT, lambda ratio: 1 - ratio),
        ):
            if reference is not None and (ratio := _ratio(row, rows[task.groups.index(reference)], of)):
                row[key] = Statistic(value(ratio), None, row[of].n, row[of].of)
    return Comparison(task, target, rows, unmeasured)


def statistic(values: Sequence[float], of: int) -> Statistic:
    """The statistic of at least one value.

    >>> statistic([1.0, 3.0], of=3).mean
    2.0
    """
    return Statistic(fmean(values), stdev(values) if len(values) > 1 else None, len(values), of)


def default_target(groups: Sequence[Group]) -> float | None:
    """99 % of the lowest mean of best validation accuracies that is at least 90 % of the highest."""
    accuracies = [[r.metrics["val/acc"] for r in g.finished if "val/acc" in r.metrics] for g in groups]
    means = [fmean(each) for each in accuracies if each]
    if not means:
        return None
    return TARGET_PART * min(mean for mean in means if mean >= CONTENDER_PART * max(means))


def time_to(run: Run, target: float) -> float | None:
    """Seconds until the end of the first validation with that accuracy; None if it is not reached or not timed.

    If the network is refined during the training, only validations at the last depth count.
    """
    curve, level = run.curves.get("val/acc"), run.curves.get("level")
    if curve is None or not len(curve.value):
        return None
    if run.config.get("ckpt") and curve.value[0] >= target:
        return None  # reached before the run was resumed
    begins = 0 if level is None or not len(level.value) else level.step[level.value.argmax()]
    points = zip(curve.step, curve.elapsed, curve.value, strict=True)
    reached = [elapsed for step, elapsed, value in points if step >= begins and value >= target]
    return float(reached[0]) if reached and reached[0] == reached[0] else None


def _statistics(group: Group, target: float | None) -> dict[str, Statistic]:
    row, runs = {}, group.finished
    for measure in MEASURES:
        if measure.key == TARGET:
            found = [] if target is None else [time_to(run, target) for run in runs]
        else:
            found = [run.metrics.get(measure.key) for run in runs]
        if values := [value for value in found if value is not None]:
            row[measure.key] = statistic(values, len(runs))
    return row


def _ratio(row: Row, reference: Row, key: str) -> float | None:
    """The ratio of the means of a measure; None if one is missing."""
    if key not in row or key not in reference or not reference[key].mean:
        return None
    return row[key].mean / reference[key].mean


# The settings of a run on one worker. Runs of earlier versions have only the first two of these keys.
ALWAYS = ("trainer.devices", "trainer.num_nodes")
ONE_WORKER = {
    **dict.fromkeys(ALWAYS, 1),
    "trainer.replicas": 1,
    "trainer.layout": "pipelines",
    "trainer.sync_batchnorm": False,
}


def _workers(config: Mapping[str, object]) -> tuple[object, object]:
    return config.get("trainer.devices", 1), config.get("trainer.num_nodes", 1)


def _one_worker(group: Group, groups: Sequence[Group]) -> Group | None:
    """The group with the same config on one worker, if this group has several workers."""
    config = dict(group.runs[0].config)
    if _workers(config) == (1, 1) or group.mixed:
        return None
    alone = {key: value for key, value in ONE_WORKER.items() if key in config or key in ALWAYS}
    wanted = identity({**config, **alone})
    return next((g for g in groups if not g.mixed and identity(g.runs[0].config) == wanted), None)


def _one_level(group: Group, groups: Sequence[Group]) -> Group | None:
    """The group with the same config but one level, if this group has several levels."""

    def apart_from_levels(other: Group) -> dict[str, object]:
        config = identity(other.runs[0].config)
        return {k: v for k, v in config.items() if not k.startswith(("strategy.level.", "strategy.levels"))}

    def levels(other: Group) -> object:
        return other.runs[0].config.get("strategy.levels", 1)

    if group.mixed or levels(group) == 1:
        return None
    wanted = apart_from_levels(group)
    return next(
        (g for g in groups if not g.mixed and levels(g) == 1 and apart_from_levels(g) == wanted), None
    )


class Yardstick:
    """A run of backpropagation in one stage on one worker, with which the speed of other runs is compared."""

    def __init__(self, run: Run) -> None:
        self.rate, self.machine, self.config = run.metrics[RATE], run.machine, identity(run.config)

    def suits(self, run: Run, config: Mapping[str, object]) -> bool:
        """Whether a run has the same data, network and machine (if both are known)."""
        if self.machine and run.machine and self.machine != run.machine:
            return False
        keys = {key for key in (*config, *self.config) if key.startswith(("dataset.", "model."))}
        return all(config.get(key) == self.config.get(key) for key in keys)

    def distance(self, config: Mapping[str, object]) -> int:
        """In how many keys its config differs from another."""
        return sum(self.config.get(key) != value for key, value in config.items())


def is_yardstick(run: Run) -> bool:
    """Whether a run is one of backpropagation in one stage on one worker, with a measured speed.

    Stages of one worker take turns with microbatches, which is slower than plain backpropagation.
    """
    alone = _workers(run.config) == (1, 1) and run.config.get("strategy.stages", 1) == 1
    return run.config["strategy"] == "backprop" and alone and RATE in run.metrics


def over_backprop(runs: Sequence[Run], yardsticks: Sequence[Yardstick]) -> list[float]:
    """The speed of each run relative to backpropagation: a ratio of samples a second.

    The speed of backpropagation is the mean over the yardsticks whose configs differ least from the run's.
    """
    ratios = []
    for run in runs:
        config = identity(run.config)
        found = [each for each in yardsticks if each.suits(run, config)]
        if run.config["strategy"] == "backprop" or RATE not in run.metrics or not found:
            continue
        least = min(each.distance(config) for each in found)
        if rate := fmean(each.rate for each in found if each.distance(config) == least):
            ratios.append(run.metrics[RATE] / rate)
    return ratios
