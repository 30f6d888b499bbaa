"""The timeline shows the first batches of all workers, once, as a trace and as a readable picture."""

from __future__ import annotations

import json
from copy import deepcopy
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sglight.callbacks.checkpoint import LastCheckpoint
from sglight.callbacks.timeline import (
    STYLES,
    Timeline,
    after_warm_up,
    batches_from,
    chrome_trace,
    draw,
    timeline_figure,
)
from sglight.link import Alone
from sglight.strategies.recorder import COMPUTING
from sglight.strategies.schedule import Decoupled
from sglight.strategies.simulation import Span, StageTimes, simulate
from sglight.strategies.staged import StagedModule
from tests.callbacks.common import fit

TWO = [range(2), range(2, 4)]
FOUR = [range(i, i + 1) for i in range(4)]
MS = 1e-3


def measured(groups: list[range], lag: int = 1, batches: int = 5) -> list[list[Span]]:
    """Spans as a run of four stages might have them: clocks far from zero, a step's own number in all it does."""
    costs = [StageTimes(1, 0.2, 2, 0.5)] * 3 + [StageTimes(1, 0, 2, 0)]
    workers = []
    for spans in simulate(Decoupled(lag), groups, costs, batches):
        step, own = 0, list[Span]()
        for s in spans:
            step = max(step, s.batch)
            own.append(s._replace(batch=step, start=7000 + s.start * MS, end=7000 + s.end * MS))
        workers.append(own)
    return workers


class Worker(Alone):
    """One of several workers that counts how often it was asked for its spans."""

    def __init__(self, rank: int) -> None:
        self.rank, self.gathered = rank, list[Any]()

    def gather(self, value: Any) -> list[Any]:
        self.gathered.append(deepcopy(value))
        return [value] if self.rank == 0 else []


class PlaceAt(Callback):
    """Gives the module other peers."""

    def __init__(self, peers: Worker) -> None:
        self.peers = peers

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, StagedModule)
        pl_module.placement.peers = self.peers


def events(trace: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The complete (X) or the metadata (M) events."""
    return [event for event in trace["traceEvents"] if event["ph"] == kind]


def test_a_run_leaves_a_trace_and_a_picture(tmp_path: Path) -> None:
    fit([Timeline(tmp_path, batches=2)], tmp_path)
    trace = json.loads((tmp_path / "timeline.json").read_text())
    found = [(e["cat"], e["tid"], e["args"]["batch"]) for e in events(trace, "X")]
    for phase in ("forward", "backward"):
        assert {f for f in found if f[0] == phase} == {(phase, i + 1, t) for i in (0, 1) for t in (1, 2)}
    assert imread(tmp_path / "figures" / "timeline.png")[..., :3].std() > 0.05
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["timeline.json", "timeline.png"]


def test_more_batches_than_the_recorder_keeps_by_itself_are_shown(tmp_path: Path) -> None:
    class KeepsOne(Callback):
        def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
            pl_module.recorder.kept = 1

    fit([KeepsOne(), Timeline(tmp_path, batches=3)], tmp_path)
    trace = json.loads((tmp_path / "timeline.json").read_text())
    assert {e["args"]["batch"] for e in events(trace, "X")} == {0, 1, 2}


def test_tensorboard_has_the_picture_once(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    fit([Timeline(tmp_path, batches=2)], tmp_path, epochs=3, logger=logger)
    images = EventAccumulator(str(tmp_path)).Reload().Images("figures/timeline")
    assert [event.step for event in images] == [3]


@pytest.mark.parametrize("rank", [0, 1])
def test_every_worker_gathers_once_and_the_first_writes(tmp_path: Path, rank: int) -> None:
    worker = Worker(rank)
    fit([PlaceAt(worker), Timeline(tmp_path, batches=2)], tmp_path, epochs=3)
    assert len(worker.gathered) == 1
    assert (tmp_path / "timeline.json").exists() == (rank == 0)


def test_a_resumed_run_shows_its_own_first_batches(tmp_path: Path) -> None:
    worker = Worker(0)
    fit([LastCheckpoint(tmp_path)], tmp_path, epochs=1)
    ckpt = tmp_path / "last.ckpt"
    fit([PlaceAt(worker), Timeline(tmp_path, batches=2)], tmp_path, epochs=3, ckpt=ckpt)
    assert len(worker.gathered) == 1
    spans, _ = worker.gathered[0]
    assert {s.batch for s in spans} == {3, 4, 5}  # of three batches an epoch
    assert (tmp_path / "timeline.json").exists()


def test_another_module_is_left_alone(tmp_path: Path) -> None:
    timeline, trainer, module = Timeline(tmp_path, 2), pl.Trainer(logger=False), pl.LightningModule()
    timeline.on_train_start(trainer, module)
    timeline.on_train_batch_end(trainer, module, None, None, 0)
    timeline.on_train_epoch_end(trainer, module)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("groups", [TWO, FOUR])
def test_the_first_batches_are_those_of_a_shorter_run(groups: list[range], lag: int) -> None:
    assert batches_from(measured(groups, lag, 5), 0, 3) == measured(groups, lag, 3)


def test_behind_the_warm_up_or_as_far_as_there_are_enough() -> None:
    def shown(batches: int) -> set[int]:
        return {
            s.batch for s in chain(*after_warm_up(measured(FOUR, batches=batches), 3)) if s.phase == "forward"
        }

    assert {8, 9, 10} <= shown(20) and max(shown(20)) == 10
    assert {2, 3, 4} <= shown(5) and {0, 1} == shown(2)


def test_parts_have_their_own_name() -> None:
    figure = timeline_figure(measured(TWO), "digits-resnet-pvd: ", "processor")
    (axes,) = figure.axes
    assert axes.get_title().startswith("digits-resnet-pvd: batches 0 to 4 on 2 workers")
    assert [label.get_text().split("   ")[-1] for label in axes.get_yticklabels()] == [
        f"processor {i}" for i in range(4)
    ]
    (name, *_) = events(chrome_trace(measured(TWO), "processor"), "M")
    assert name["args"]["name"] == "worker 0: processors 0-1"


def test_waiting_of_an_evaluation_is_left_out() -> None:
    spans = measured(TWO)
    begin, end = spans[0][0].start, max(s.end for s in chain(*spans))
    with_evaluation = [
        [Span("wait", 0, 0, begin - 9, begin - 8), *spans[0], Span("wait", 0, 4, end + 1, end + 2)],
        # The second worker waits from before the first batch on.
        [spans[1][0]._replace(start=begin - 9), *spans[1][1:], Span("wait", 2, 4, end + 1, end + 2)],
    ]
    assert batches_from(with_evaluation, 0, 5) == spans
    assert batches_from([[Span("wait", 0, 0, 1.0, 2.0)], []], 0, 5) == [[], []]
    gap = [[Span("forward", 0, 0, 0.0, 1.0), Span("forward", 0, 101, 2.0, 3.0)]]
    assert batches_from(gap, 1, 8) == [gap[0][1:]]
    assert batches_from(gap, 2, 8) == [[]]


def test_the_trace_has_the_spans_in_microseconds() -> None:
    spans = measured(TWO)
    trace = json.loads(json.dumps(chrome_trace(spans)))
    complete = events(trace, "X")
    begin = min(s.start for s in chain(*spans))
    assert min(e["ts"] for e in complete) == 0
    back = [
        (e["cat"], e["args"]["stage"], e["args"]["batch"], e["pid"] - 1, e["tid"] - 1, e["ts"], e["dur"])
        for e in complete
    ]
    expected = [
        (s.phase, s.stage, s.batch, worker, s.stage, (s.start - begin) * 1e6, (s.end - s.start) * 1e6)
        for worker, own in enumerate(spans)
        for s in own
    ]
    for ours, theirs in zip(back, expected, strict=True):
        assert ours[:5] == theirs[:5] and ours[5:] == pytest.approx(theirs[5:], abs=0.01)


def test_the_trace_names_workers_and_stages() -> None:
    metadata = events(chrome_trace([*measured(TWO), []]), "M")
    assert {e["pid"]: e["args"]["name"] for e in metadata if e["name"] == "process_name"} == {
        1: "worker 0: stages 0-1",
        2: "worker 1: stages 2-3",
        3: "worker 2",
    }
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    assert threads == {(1, 1): "stage 0", (1, 2): "stage 1", (2, 3): "stage 2", (2, 4): "stage 3"}
    (alone,) = (e for e in events(chrome_trace(measured(FOUR)[2:3]), "M") if e["name"] == "process_name")
    assert alone["args"]["name"] == "worker 0: stage 2"


def test_replicas_are_named() -> None:
    spans = 2 * measured(TWO)
    metadata = events(chrome_trace(spans, replicas=[0, 0, 1, 1]), "M")
    names = [e["args"]["name"] for e in metadata if e["name"] == "process_name"]
    assert names[:1] + names[-1:] == ["worker 0: stages 0-1, replica 0", "worker 3: stages 2-3, replica 1"]
    labels = timeline_figure(spans, replicas=[0, 0, 1, 1]).axes[0].get_yticklabels()
    assert "worker 2, replica 1   stage 0" in {label.get_text() for label in labels}


def test_nothing_overlaps_in_a_thread() -> None:
    complete = events(chrome_trace(measured(FOUR, lag=0)), "X")
    for tid in range(1, 5):
        own = [e for e in complete if e["tid"] == tid]
        assert own and all(a["ts"] + a["dur"] <= b["ts"] + 0.01 for a, b in pairwise(own))


@pytest.mark.parametrize("groups", [[range(4)], TWO, FOUR])
def test_the_picture_has_a_lane_a_stage_and_all_phases(tmp_path: Path, groups: list[range]) -> None:
    spans = measured(groups)
    figure = timeline_figure(spans)
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert [name.split("   ")[-1] for name in names] == [f"stage {i}" for i in range(4)]
    assert [n.split("   ")[0] for n in names if "worker" in n] == [f"worker {w}" for w in range(len(groups))]
    draw(spans, tmp_path / "timeline.png")
    pixels = imread(tmp_path / "timeline.png")[..., :3]
    shown = {span.phase for span in chain(*spans)} & set(COMPUTING)
    assert shown == set(COMPUTING) - {"arrive"}, "synthetic gradients have no second backward pass"
    for phase in shown:
        assert (abs(pixels - to_rgb(STYLES[phase].colour)).max(-1) < 0.01).sum() > 50, phase


@pytest.mark.parametrize(("batches", "all_fit"), [(3, True), (40, False)])
def test_numbers_stay_inside_their_bars(batches: int, all_fit: bool) -> None:
    spans = measured(FOUR, batches=batches)
    figure = timeline_figure(spans)
    (axes,) = figure.axes
    begin = min(s.start for s in chain(*spans))
    numbers = [text for text in axes.texts if text.get_text().isdigit()]
    bars = [s for s in chain(*spans) if s.phase in ("forward", "backward")]
    assert numbers
    assert all_fit == (len(numbers) >= len(bars))
    for text in numbers:
        left, right = (axes.transData.inverted().transform(edge)[0] / 1e3 + begin for edge in _edges(text))
        assert any(
            s.start <= left and right <= s.end and str(s.batch) == text.get_text() for s in chain(*spans)
        )


def test_the_share_of_computing_is_right() -> None:
    spans = [[Span("forward", 0, 0, 0.0, 3.0), Span("wait", 0, 1, 3.0, 4.0)], [Span("learn", 1, 0, 1.0, 2.0)]]
    shares = [text.get_text() for text in timeline_figure(spans).axes[0].texts if "%" in text.get_text()]
    assert shares == ["computes\n75 %", "computes\n25 %"]


def _edges(text: Text) -> tuple[Any, Any]:
    box = text.get_window_extent()
    return box.p0, box.p1
