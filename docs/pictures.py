"""Draws the pictures of the documentation.

python docs/pictures.py schedules    # of each strategy, most by the program's own simulation; a second
python docs/pictures.py timelines    # two trainings on two workers, recorded; a minute, needs two free cores
python docs/pictures.py all
python docs/pictures.py frontier FOLDER    # of the runs of experiment=frontier in a folder
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from matplotlib.ticker import LogLocator, NullFormatter

from sglight.callbacks.pictures import COLOURS, new_figure, tidy
from sglight.callbacks.timeline import STYLES, Timeline
from sglight.report.runs import find_runs
from sglight.strategies.schedule import Arriving, Decoupled, Locked, Pipelined, Schedule, Unanswered
from sglight.strategies.simulation import Span, StageTimes, simulate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent / "pictures"
WORKERS = 4
DPI = 130
# A backward pass costs two forward passes; an estimator is small beside its stage, and the last stage has none.
PLAIN = StageTimes(forward=1.0, backward=2.0)
PREDICTING = StageTimes(forward=1.0, estimate=0.15, backward=2.0, learn=0.45)
CLASSIFYING = StageTimes(forward=1.0, estimate=0.45, backward=2.0)
TWICE = StageTimes(forward=1.0, estimate=0.45, backward=2.0, arrive=2.0)
# By name: the schedule, what a batch costs a stage, how many batches, and until when they are shown.
SCHEDULES: dict[str, tuple[Schedule, StageTimes, int, float]] = {
    "locked": (Locked(), PLAIN, 3, 30),
    "flushed": (Pipelined(pieces=8, flushes=True), PLAIN, 3, 12),
    "delayed": (Pipelined(pieces=1), PLAIN, 12, 30),
    "dni": (Decoupled(lag=1), PREDICTING, 10, 30),
    "local": (Unanswered(), CLASSIFYING, 10, 30),
    "blend": (Arriving(), TWICE, 10, 30),
}
PHASES = ("forward", "estimate", "backward", "arrive", "learn")
# What is not simulated has colours of the same kind.
LOOKS = {
    **STYLES,
    "directions": STYLES["backward"],
    "minimise": STYLES["forward"],
    "synchronise": STYLES["learn"],
    "old step": STYLES["forward"],
    "new step": STYLES["arrive"],
}

# The network of the timelines: what a stage computes for a batch takes long enough to be seen.
NETWORK = {"shape": (64,), "classes": 10, "channels": 256, "steps": 32, "horizon": 4.0}
OPTIMIZER = {"name": "adam", "lr": 0.001}
BATCHES, SHOWN = 60, 5  # recorded; shown of the locked training


def lanes(
    axes: Axes,
    workers: Sequence[Sequence[Span]],
    end: float,
    size: float = 8,
    names: Sequence[str] | None = None,
) -> None:
    """A lane a worker from time 0 to ``end``: bars of its phases, with the batch's number where there is room."""
    names = names or [f"worker {i}" for i in range(len(workers))]
    axes.set(xlim=(0, end), ylim=(len(workers), 0))
    axes.set_yticks([i + 0.5 for i in range(len(workers))], names)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for i, spans in enumerate(workers):
        axes.broken_barh(
            [(0, end)], (i + 0.08, 0.84), facecolor="#F4F4F4", edgecolor="#BBBBBB", hatch="////", linewidth=0
        )
        for span in spans:
            if span.phase in ("wait", "send") or span.start >= end:
                continue
            style, width = LOOKS[span.phase], min(span.end, end) - span.start
            bar = (i + 0.08, 0.84)
            axes.broken_barh(
                [(span.start, width)], bar, facecolor=style.colour, edgecolor="white", linewidth=0.6
            )
            if width > end * 0.014 * size / 8 * len(str(span.batch)):
                middle = (span.start + width / 2, i + 0.5)
                axes.annotate(
                    str(span.batch), middle, color=style.ink, fontsize=size, ha="center", va="center_baseline"
                )


def figure(panels: int, workers: int) -> tuple[Figure, Any]:
    """An empty figure with so many panels beneath each other, and its legend's place."""
    made = new_figure(9, panels * (0.65 + 0.3 * workers) + 0.35)
    return made, made.subplots(panels, 1, squeeze=False)[:, 0]


def legend(made: Figure, phases: Sequence[str], waits: bool = True) -> None:
    """The colours of the phases, and what is hatched."""
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=LOOKS[phase].colour, label=phase) for phase in phases]
    if waits:
        handles.append(
            Patch(facecolor="#F4F4F4", edgecolor="#BBBBBB", hatch="////", linewidth=0, label="waits")
        )
    made.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)


def schedules(folder: Path) -> None:
    """A picture of each schedule: four stages on four workers, messages for nothing."""
    for name, (schedule, costs, batches, end) in SCHEDULES.items():
        groups = [range(i, i + 1) for i in range(WORKERS)]
        workers = simulate(schedule, groups, [*[costs] * (WORKERS - 1), PLAIN], batches)
        made, (axes,) = figure(1, WORKERS)
        lanes(axes, workers, end)
        axes.set_xlabel("time, in forward passes of a stage; in the bars: number of the batch", fontsize=9)
        legend(made, [phase for phase in PHASES if getattr(costs, phase)])
        made.savefig(folder / f"schedule-{name}.png", dpi=DPI)
    levels(folder)
    iterations(folder)


def levels(folder: Path) -> None:
    """The steps of three levels over the time of the network, from coarse to fine."""
    numbers = (4, 8, 16)
    steps = [
        [Span("new step" if j % 2 and k else "old step", 0, j, j / n, (j + 1) / n) for j in range(n)]
        for k, n in enumerate(numbers)
    ]
    made, (axes,) = figure(1, len(numbers))
    lanes(axes, steps, 1.0, names=[f"level {k}: {n} steps" for k, n in enumerate(numbers)])
    axes.set_xticks([0, 1], ["0", "T"])
    axes.set_xlabel("time of the network; in the bars: number of the step", fontsize=9)
    legend(made, ["old step", "new step"], waits=False)
    made.savefig(folder / "schedule-multilevel.png", dpi=DPI)


def iterations(folder: Path) -> None:
    """A sketch of three iterations of parallel variable distribution; the processors are unequal a little."""
    directions, longest, synchronise = 1.0, 6.0, 1.5
    spans: list[list[Span]] = [[] for _ in range(WORKERS)]
    start = 0.0
    for n in range(3):
        for i, own in enumerate(spans):
            least = start + directions
            most, end = least + longest, least + longest + synchronise
            own += [
                Span("directions", i, n, start, least),
                Span("minimise", i, n, least, most - 0.3 * ((i + n) % WORKERS)),
                Span("synchronise", i, n, most, end),
            ]
        start = end
    made, (axes,) = figure(1, WORKERS)
    lanes(axes, spans, start, names=[f"processor {i}" for i in range(WORKERS)])
    axes.set_xticks([])
    axes.set_xlabel("time (a sketch); in the bars: number of the iteration", fontsize=9)
    legend(made, ["directions", "minimise", "synchronise"])
    made.savefig(folder / "schedule-pvd.png", dpi=DPI)


def record(module: Any, late: bool = False) -> list[list[Span]]:
    """What two workers did in the first batches of a training on handwritten digits, in seconds.

    Args:
        late: whether the first stage goes backward on the batch before the one on which it goes forward.
    """
    import pytorch_lightning as pl
    import torch
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset

    from sglight.parallel.strategy import StageStrategy

    x, y = load_digits(return_X_y=True)
    samples = TensorDataset(torch.tensor(x / 16, dtype=torch.float32).repeat(9, 1), torch.tensor(y).repeat(9))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            strategy=StageStrategy(threads=1), devices=2, accelerator="cpu", max_epochs=1, logger=False,
            limit_train_batches=BATCHES, callbacks=[Timeline(Path(folder), BATCHES)], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(samples, 256))
        events = json.loads((Path(folder) / "timeline.json").read_text())["traceEvents"]
    workers: list[list[Span]] = [[], []]
    for e in events:
        if e["ph"] == "X":
            stage, batch = e["args"]["stage"], e["args"]["batch"]
            if e["cat"] == "backward":  # recorded is in which batch's round it was done
                batch -= late * (1 - stage)
            start, end = e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6
            workers[e["pid"] - 1].append(Span(e["cat"], stage, batch, start, end))
    return workers


def timelines(folder: Path) -> None:
    """Backpropagation in two stages above late gradients, over the same stretch of real time."""
    from sglight.strategies.delayed import Delayed
    from sglight.strategies.staged import StagedModule

    recorded = {
        "locked: a stage waits until the gradient is back": record(
            StagedModule(NETWORK, OPTIMIZER, stages=2)
        ),
        "decoupled: a stage takes the next batch, and gradients come a little late": record(
            Delayed(NETWORK, OPTIMIZER, stages=2, microbatches=1), late=True
        ),
    }
    made, panels = figure(len(recorded), 2)
    seconds = 0.0
    for axes, (title, workers) in zip(panels, recorded.items(), strict=True):
        begin, end = fastest(workers)
        seconds = seconds or end - begin  # as many for both
        shown = [clipped(own, begin, begin + seconds) for own in workers]
        busy = sum(s.end - s.start for own in shown for s in own) / (seconds * 1e3) / len(shown)
        lanes(axes, shown, seconds * 1e3)
        axes.set_title(f"{title} (workers compute {busy:.0%} of the time)", fontsize=10, loc="left")
    panels[-1].set_xlabel("time [ms]; in the bars: number of the batch", fontsize=9)
    legend(made, ["forward", "backward"])
    made.savefig(folder / "locked-decoupled.png", dpi=DPI)


def fastest(workers: Sequence[Sequence[Span]]) -> tuple[float, float]:
    """From when to when ``SHOWN`` batches took the least time: others on the machine disturbed these least."""
    starts = sorted(span.start for span in workers[0] if span.phase == "forward")
    return min(zip(starts, starts[SHOWN:], strict=False), key=lambda ends: ends[1] - ends[0])


def clipped(spans: Sequence[Span], begin: float, end: float) -> list[Span]:
    """What is computed from ``begin`` to ``end``, in milliseconds from there."""
    return [
        s._replace(start=(max(s.start, begin) - begin) * 1e3, end=(min(s.end, end) - begin) * 1e3)
        for s in spans
        if s.phase not in ("wait", "send") and s.end > begin and s.start < end
    ]


def frontier(runs: Path, folder: Path) -> None:
    """Test accuracy over seconds, a line a strategy and a point a number of stages; means over seeds."""
    found = means(runs)
    made = new_figure(9, 4)
    panels = made.subplots(1, 2, sharey=True)
    for strategy, colour in zip(dict.fromkeys(name for name, _ in found), COLOURS, strict=False):
        stages = sorted(m for name, m in found if name == strategy)
        points = [found[strategy, m] for m in stages]
        for axes, k in zip(panels, (1, 2), strict=True):
            axes.plot([p[k] for p in points], [p[0] for p in points], "o-", color=colour, label=strategy)
            for m, p in zip(stages, points, strict=True):
                axes.annotate(f"{m}", (p[k], p[0]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    tidy(panels[0], "test accuracy, %")
    tidy(panels[1], "")
    panels[0].set(xscale="log", xlabel="CPU seconds in one process")
    panels[1].set(xscale="log", xlabel="ideal seconds, a worker for each stage")
    for axes in panels:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[1].legend(frameon=False, fontsize=9, title="numbers: stages", title_fontsize=9)
    made.savefig(folder / "frontier.png")


def means(runs: Path) -> dict[tuple[str, int], tuple[float, float, float]]:
    """By strategy and number of stages: test accuracy in per cent, CPU seconds, and these by the ideal speed-up."""
    values = defaultdict(list)
    for m, run in ((run.metrics, run) for run in find_runs([runs]) if run.state == "finished"):
        point = m["test/acc"] * 100, m["time/cpu_s"], m["time/cpu_s"] / m.get("speedup/theoretical", 1.0)
        values[str(run.config["strategy"]), int(m["run/stages"])].append(point)
    return {key: tuple(map(fmean, zip(*points, strict=True))) for key, points in values.items()}  # type: ignore[misc]


if __name__ == "__main__":
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    if wanted == "frontier" and len(sys.argv) == 3:
        frontier(Path(sys.argv[2]), FOLDER)
    elif wanted not in ("schedules", "timelines", "all") or len(sys.argv) > 2:
        sys.exit(__doc__)
    if wanted in ("schedules", "all"):
        schedules(FOLDER)
    if wanted in ("timelines", "all"):
        timelines(FOLDER)
