"""What the recorder counts, and in which batches."""

from __future__ import annotations

from time import sleep

import pytest

from sglight.link import alone
from sglight.strategies.recorder import Recorder
from sglight.strategies.simulation import StageTimes


def record(recorder: Recorder, batch: int, timed: bool, seconds: float = 0.0) -> None:
    recorder.begin(batch, timed, cuda=False)
    for phase in ("wait", "forward", "backward", "backward"):
        with recorder.phase(phase, 0):
            sleep(seconds)


def test_only_timed_batches_make_typical_times() -> None:
    recorder = Recorder()
    record(recorder, 0, timed=False, seconds=0.001)
    assert recorder.typical(0) == StageTimes()
    record(recorder, 1, timed=True, seconds=0.002)
    times = recorder.typical(0)
    assert times.forward >= 0.002
    assert times.backward >= 0.004  # a phase may come in parts
    assert times.learn == 0


def test_spans_are_those_of_the_first_batches_in_order() -> None:
    recorder = Recorder(kept=2)
    for batch in range(4):
        record(recorder, batch, timed=False)
    assert [span.batch for span in recorder.spans] == [0] * 4 + [1] * 4
    assert [span.phase for span in recorder.spans[:4]] == ["wait", "forward", "backward", "backward"]
    assert all(a.end <= b.start for a, b in zip(recorder.spans, recorder.spans[1:], strict=False))


def test_shares_are_of_an_epoch() -> None:
    recorder, placement = Recorder(), alone(2)
    placement.states[0].waited_s = 5.0
    recorder.clear(placement)
    record(recorder, 0, timed=False, seconds=0.001)
    placement.states[0].waited_s += 0.25
    placement.gradients[0].moved_s += 0.5
    shares = recorder.shares(placement)
    assert shares["busy"] >= 0.003
    assert (shares["waiting"], shares["communicating"]) == (0.25, 0.5)
    recorder.clear(placement)
    assert recorder.shares(placement) == {"busy": pytest.approx(0), "waiting": 0, "communicating": 0}
