"""Collects the learning rates of all stages at every worker; Lightning's callback has only those of its own."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor

from sglight.link import Peers
from sglight.strategies.curves import Curves


class Rates:
    """Sends what each worker's `LearningRateMonitor` logs to all workers, through `Curves`, so that no worker waits."""

    def __init__(self) -> None:
        self._monitors: list[LearningRateMonitor] = []
        self._names: list[str] = []
        self._seen = 0

    def begin(self, trainer: pl.Trainer, peers: Peers) -> None:
        """Starts a training, after its callbacks have started; every worker waits for the others."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._monitors = [each for each in callbacks if isinstance(each, LearningRateMonitor)]
        if peers.size == 1 or not self._monitors:
            self._monitors = []
            return
        own = [name for each in self._monitors for name in _latest(each)]
        self._names = list(dict.fromkeys(name for names in peers.share(own) for name in names))
        self._seen = 0

    def report(self, trainer: pl.Trainer, peers: Peers, curves: Curves, step: int) -> None:
        """Reports what the callback has logged since the last call; it logs at all workers or at none."""
        seen = sum(len(rates) for each in self._monitors for rates in each.lrs.values())
        if seen > self._seen:
            self._seen, known = seen, dict[str, float]()
            for each in self._monitors:
                known |= {name: value for name, value in _latest(each).items() if value is not None}
            curves.report(peers, step, trainer.current_epoch, self._names, known, logged=known)


def _latest(monitor: LearningRateMonitor) -> dict[str, Any]:
    """The last values that a monitor has logged; None for those that it has not logged yet."""
    values: dict[str, Any] = {name: rates[-1] if rates else None for name, rates in monitor.lrs.items()}
    values |= monitor.last_momentum_values if monitor.log_momentum else {}
    return values | (monitor.last_weight_decay_values if monitor.log_weight_decay else {})
