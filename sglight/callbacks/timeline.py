"""What each worker did in a few batches, as a trace for a trace viewer and as a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from sglight import units
from sglight.callbacks.pictures import new_figure, publish, run_name, save_figure
from sglight.files import write_atomically
from sglight.strategies.recorder import COMPUTING
from sglight.strategies.schedule import stage_names
from sglight.strategies.simulation import Span
from sglight.strategies.staged import StagedModule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class PhaseStyle(NamedTuple):
    """How a phase is drawn: the colours of its bars and of text in them, and the name of a chrome://tracing colour."""

    colour: str
    ink: str
    trace: str


# Colours of Okabe & Ito 2008, which can be told apart with any colour vision. Waiting is hatched.
STYLES = {
    "forward": PhaseStyle("#0072B2", "white", "thread_state_runnable"),
    "estimate": PhaseStyle("#CC79A7", "black", "thread_state_uninterruptible"),
    "backward": PhaseStyle("#D55E00", "white", "thread_state_iowait"),
    "arrive": PhaseStyle("#E69F00", "black", "thread_state_iowait"),
    "learn": PhaseStyle("#009E73", "white", "thread_state_running"),
    "send": PhaseStyle("#F0E442", "black", "thread_state_unknown"),
    "wait": PhaseStyle("#F4F4F4", "#AAAAAA", "thread_state_sleeping"),
}
LANE, GAP, EDGE = (
    1.0,
    0.4,
    0.06,
)  # heights: of a stage's lane, between workers, and of the margin within a lane
FONT_SIZE = 8
WARM_UP = 8  # the first batches, which are slower, and in which a pipeline is filled


class Timeline(Callback):
    """Writes ``timeline.json`` (`chrome_trace`) and ``figures/timeline.png`` of a few batches after the warm-up.

    They are written once, at the end of the first epoch: the workers' records are gathered at worker 0, and within an
    epoch all of them would have to stop for that. Times can be compared between workers of one machine only.

    Args:
        folder: of the run.
        batches: how many to show.
    """

    def __init__(self, folder: Path | None = None, batches: int = 8) -> None:
        self.folder = folder
        self.batches = batches
        self._trained = self._done = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trained = self._done = False  # a callback may see several trainings
        if isinstance(pl_module, StagedModule):
            pl_module.recorder.kept = max(pl_module.recorder.kept, WARM_UP + self.batches)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._trained = True

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Whether to gather must not depend on what this worker recorded, because all of them must do the same.
        if self._done or not self._trained or not isinstance(pl_module, StagedModule):
            return
        self._done = True
        place = pl_module.placement
        gathered = place.peers.gather((pl_module.recorder.spans, place.replicas.rank))
        if place.peers.rank == 0 and not getattr(trainer, "fast_dev_run", False):
            spans = after_warm_up([own for own, _ in gathered], self.batches)
            replicas = [replica for _, replica in gathered] if place.replicas.size > 1 else ()
            self._write(trainer, pl_module, spans, replicas)

    def _write(
        self, trainer: pl.Trainer, module: StagedModule, spans: list[list[Span]], replicas: Sequence[int]
    ) -> None:
        if not any(spans):
            return
        folder = self.folder or Path(trainer.default_root_dir)
        write_atomically(folder / "timeline.json", json.dumps(chrome_trace(spans, module.part, replicas)))
        publish(
            trainer,
            timeline_figure(spans, f"{run_name(trainer, module)}: ", module.part, replicas),
            folder / "figures",
            "timeline",
        )


def after_warm_up(spans: Sequence[Sequence[Span]], count: int) -> list[list[Span]]:
    """What each worker did for ``count`` batches after the warm-up, which is shortened if there are too few batches."""
    recorded = len({s.batch for s in chain(*spans) if s.phase == "forward"})
    return batches_from(spans, min(WARM_UP, max(recorded - count, 0)), count)


def batches_from(spans: Sequence[Sequence[Span]], first: int, count: int) -> list[list[Span]]:
    """What each worker did for ``count`` batches, beginning with the forward pass of the ``first``.

    Waiting before and after them, as in a validation, is left out.
    """
    forward = [s for s in chain(*spans) if s.phase == "forward"]
    # Not all batches are recorded.
    chosen = sorted({s.batch for s in forward})[first : first + count]
    if not chosen:
        return [[] for _ in spans]
    begin, stop = min(s.start for s in forward if s.batch >= chosen[0]), chosen[-1] + 1
    # In the order of time: an estimator that learns from an older batch does so during the present one.
    kept = [
        list(takewhile(lambda s: s.batch < stop, sorted((s for s in own if s.end > begin), key=_start)))
        for own in spans
    ]
    end = max(s.end for s in chain(*kept) if s.phase in COMPUTING)
    return [[s._replace(start=max(s.start, begin)) for s in own if s.end <= end] for own in kept]


def chrome_trace(
    spans: Sequence[Sequence[Span]], part: str = "stage", replicas: Sequence[int] = ()
) -> dict[str, Any]:
    """The spans of each worker in the Trace Event Format, for https://ui.perfetto.dev or chrome://tracing.

    Workers are shown as processes and stages as threads. Their ids begin at 1, because Perfetto reserves 0. Times are
    in microseconds since the earliest start.

    Args:
        spans: of each worker.
        part: what a stage is called.
        replicas: the replica that each worker belongs to; empty if there is only one.
    """
    begin = min((s.start for s in chain(*spans)), default=0.0)
    events = list[dict[str, Any]]()
    for worker, own in enumerate(spans):
        stages = sorted({s.stage for s in own})
        process = {"ph": "M", "pid": worker + 1}
        events.append(
            {
                **process,
                "name": "process_name",
                "args": {"name": _worker_name(worker, stages, part, replicas)},
            }
        )
        events.append({**process, "name": "process_sort_index", "args": {"sort_index": worker}})
        for stage in stages:
            thread = {**process, "tid": stage + 1}
            events.append({**thread, "name": "thread_name", "args": {"name": f"{part} {stage}"}})
            events.append({**thread, "name": "thread_sort_index", "args": {"sort_index": stage}})
        events += [_event(worker, span, begin) for span in sorted(own, key=_start)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(worker: int, span: Span, begin: float) -> dict[str, Any]:
    return {
        "ph": "X",
        # Perfetto ignores `cname`; it chooses a colour by the name without its digits.
        "name": f"{span.phase} {span.batch}",
        "cat": span.phase,
        "pid": worker + 1,
        "tid": span.stage + 1,
        "ts": round((span.start - begin) * 1e6, 3),
        "dur": round((span.end - span.start) * 1e6, 3),
        "cname": STYLES[span.phase].trace,
        "args": {"batch": span.batch, "stage": span.stage},
    }


def _worker_name(worker: int, stages: Sequence[int], part: str, replicas: Sequence[int]) -> str:
    parts = [stage_names(stages, part)] if stages else []
    parts += [f"replica {replicas[worker]}"] if replicas else []
    return f"worker {worker}: {', '.join(parts)}" if parts else f"worker {worker}"


def draw(spans: Sequence[Sequence[Span]], path: Path) -> None:
    """Writes `timeline_figure` as a PNG."""
    save_figure(timeline_figure(spans), path)


def timeline_figure(
    spans: Sequence[Sequence[Span]], run: str = "", part: str = "stage", replicas: Sequence[int] = ()
) -> Figure:
    """A lane for each stage of each worker: forward passes in its upper half, other computations below.

    The numbers in the bars are those of the batches. At the right stands which part of the time each worker computes.

    Args:
        spans: of each worker.
        run: the beginning of the title.
        part: what a stage is called.
        replicas: the replica that each worker belongs to; empty if there is only one.
    """
    begin, end = min(s.start for s in chain(*spans)), max(s.end for s in chain(*spans))
    lanes = _lanes(spans, part, replicas)
    bottom = lanes[-1].top + LANE + GAP
    figure = new_figure(12.2, 1.4 + 0.36 * bottom)
    axes = figure.add_subplot()
    axes.set(xlim=(0, (end - begin) * 1e3), ylim=(bottom, 0), xlabel="time [ms]")
    axes.set_title(f"{run}{_title(spans)}", fontsize=11)
    axes.set_yticks([lane.top + LANE / 2 for lane in lanes], [lane.name for lane in lanes])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    for lane in lanes:
        _draw_bars(axes, lane, begin)
    for worker, own in enumerate(spans):
        computing = sum(s.end - s.start for s in own if s.phase in COMPUTING) / (end - begin)
        middle = [lane.top + LANE / 2 for lane in lanes if lane.worker == worker]
        if middle:
            axes.text(
                1.01, sum(middle) / len(middle), f"computes\n{units.share(computing)}",
                transform=axes.get_yaxis_transform(), va="center", fontsize=9,
            )  # fmt: skip
    _draw_legend(figure, {s.phase for s in chain(*spans)})
    _number_bars(figure, axes, lanes, begin)
    return figure


class Lane(NamedTuple):
    """What a worker did for one of its stages; ``top`` is where the lane begins, from the upper edge down."""

    worker: int
    stage: int
    top: float
    name: str
    spans: list[Span]


def _lanes(spans: Sequence[Sequence[Span]], part: str, replicas: Sequence[int]) -> list[Lane]:
    """The lanes of all stages of all workers, from top to bottom."""
    lanes, top = list[Lane](), 0.0
    for worker, own in enumerate(spans):
        top += GAP
        for k, stage in enumerate(sorted({s.stage for s in own})):
            copy = f", replica {replicas[worker]}" if replicas else ""
            name = f"worker {worker}{copy}   {part} {stage}" if k == 0 else f"{part} {stage}"
            lanes.append(Lane(worker, stage, top, name, [s for s in own if s.stage == stage]))
            top += LANE
    return lanes


def _draw_bars(axes: Axes, lane: Lane, begin: float) -> None:
    for phase, style in STYLES.items():
        bars = [((s.start - begin) * 1e3, (s.end - s.start) * 1e3) for s in lane.spans if s.phase == phase]
        top, height = _place(phase)
        axes.broken_barh(bars, (lane.top + top, height), **_bar(phase, style))


def _place(phase: str) -> tuple[float, float]:
    """Where in its lane the bar of a phase begins, and how high it is."""
    if phase not in COMPUTING:
        return EDGE, LANE - 2 * EDGE
    return (EDGE if phase == "forward" else LANE / 2), LANE / 2 - EDGE


def _bar(phase: str, style: PhaseStyle) -> dict[str, Any]:
    """The properties of a bar for matplotlib."""
    if phase == "wait":
        return {"facecolor": style.colour, "edgecolor": style.ink, "hatch": "////", "linewidth": 0}
    return {"facecolor": style.colour, "edgecolor": "white", "linewidth": 0.3}


def _draw_legend(figure: Figure, phases: set[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(label=phase, **_bar(phase, style)) for phase, style in STYLES.items() if phase in phases]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)


def _number_bars(figure: Figure, axes: Axes, lanes: Sequence[Lane], begin: float) -> None:
    """Writes the number of the batch into each bar of a computation that is wide enough."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = figure.get_layout_engine()
    assert isinstance(layout, ConstrainedLayoutEngine)
    layout.set(w_pad=0.1)  # inches, because text is wider at the resolution of the file
    layout.execute(figure)  # now the axes have their final width,
    # which the numbers in the bars must not change; "none" would lay out once more.
    figure.set_layout_engine(None)
    left, right = axes.get_xlim()
    points_per_ms = axes.get_window_extent().width / figure.dpi * 72 / (right - left)
    for lane in lanes:
        for span in lane.spans:
            room = (span.end - span.start) * 1e3 * points_per_ms
            if span.phase in COMPUTING and room > FONT_SIZE * (0.6 * len(str(span.batch)) + 0.4):
                middle = (span.start + span.end) / 2 - begin
                top, height = _place(span.phase)
                axes.text(
                    middle * 1e3, lane.top + top + height / 2, str(span.batch), color=STYLES[span.phase].ink,
                    fontsize=FONT_SIZE, ha="center", va="center_baseline",
                )  # fmt: skip


def _title(spans: Sequence[Sequence[Span]]) -> str:
    batches = {s.batch for s in chain(*spans) if s.phase == "forward"}
    shown = f"batch {min(batches)}" if len(batches) == 1 else f"batches {min(batches)} to {max(batches)}"
    return f"{shown} on {units.plural(len(spans), 'worker')}; in the bars: number of the batch"


def _start(span: Span) -> float:
    return span.start
