"""Measures how a worker spends its time: computing, waiting for others, moving tensors."""

from __future__ import annotations

from statistics import median
from time import perf_counter
from types import TracebackType

import torch

from sglight.link import Placement
from sglight.strategies.simulation import Span, StageTimes

COMPUTING = ("forward", "estimate", "backward", "arrive", "learn")


class Recorder:
    """Times the phases of the stages of this worker.

    On CUDA it measures the time of the host, which runs ahead of the device, except in batches that are ``timed``: in
    these it waits for the device at the end of each phase.

    Attributes:
        spans: all phases of the first ``kept`` batches.
    """

    def __init__(self, kept: int = 16) -> None:
        self.kept = kept
        self.spans: list[Span] = []
        self.batch = 0
        self._batches = 0
        self._timed = self._cuda = False
        self._busy = 0.0
        self._channels = (0.0, 0.0)
        # For each stage and phase, the seconds in each timed batch.
        self._laps: dict[tuple[int, str], dict[int, float]] = {}

    def clear(self, placement: Placement) -> None:
        """Begins an epoch."""
        self._busy = 0.0
        self._channels = _counters(placement)
        self._laps.clear()

    def begin(self, batch: int, timed: bool, cuda: bool) -> None:
        """Begins a batch."""
        self.batch, self._timed, self._cuda = batch, timed, cuda
        self._batches += 1

    def phase(self, name: str, stage: int) -> Phase:
        """A context whose time is measured."""
        return Phase(self, name, stage)

    def now(self) -> float:
        """The time; in a timed batch on CUDA after waiting for the device."""
        if self._timed and self._cuda:
            torch.cuda.synchronize()
        return perf_counter()

    def add(self, name: str, stage: int, start: float, end: float) -> None:
        """Adds a phase from ``start`` to ``end``."""
        if name in COMPUTING:
            self._busy += end - start
        if self._timed:
            laps = self._laps.setdefault((stage, name), {})
            laps[self.batch] = laps.get(self.batch, 0.0) + end - start
        if self._batches <= self.kept:
            self.spans.append(Span(name, stage, self.batch, start, end))

    def typical(self, stage: int) -> StageTimes:
        """The median seconds of each phase of a stage over the timed batches."""
        laps = {name: self._laps[stage, name] for name in COMPUTING if (stage, name) in self._laps}
        return StageTimes(**{name: median(seconds.values()) for name, seconds in laps.items()})

    def shares(self, placement: Placement) -> dict[str, float]:
        """The seconds since `clear` in which this worker was busy, waiting for others, and communicating."""
        waited, moved = (a - b for a, b in zip(_counters(placement), self._channels, strict=True))
        return {"busy": self._busy, "waiting": waited, "communicating": moved}


class Phase:
    """The context of `Recorder.phase`."""

    __slots__ = ("_name", "_recorder", "_stage", "_start")

    def __init__(self, recorder: Recorder, name: str, stage: int) -> None:
        self._recorder, self._name, self._stage = recorder, name, stage

    def __enter__(self) -> None:
        self._start = self._recorder.now()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.add(self._name, self._stage, self._start, self._recorder.now())


def _counters(placement: Placement) -> tuple[float, float]:
    """The seconds that this worker has waited for others, and that its channels have copied tensors, in all."""
    channels, others = placement.channels, {placement.peers, placement.pipeline, placement.replicas}
    return sum(each.waited_s for each in [*channels, *others]), sum(c.moved_s for c in channels)
