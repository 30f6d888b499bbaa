"""Logs values of single batches that are known to different workers, without making the workers wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
from torch import Tensor

from sglight.link import Peers, Pending

SHOWN = ("train/loss", "train/acc")  # curves that the progress bar shows


@dataclass
class _Report:
    """One batch: for each name the sum over all workers of weight times value, and that of the weights.

    The sum of the weights is 0 for a value that no worker knows.
    """

    step: int
    epoch: int
    names: Sequence[str]
    sums: Pending
    logged: Collection[str]

    def values(self) -> dict[str, float]:
        numbers = self.sums.result()
        weights = numbers[len(self.names) :]
        return {name: value / w for name, value, w in zip(self.names, numbers, weights, strict=False) if w}


class Curves:
    """Curves over batches whose values are known to different workers.

    A report is logged when it has arrived, under the number of its batch, because waiting for it would make the workers
    wait for each other.

    Attributes:
        listeners: called at every worker with the number of the batch and the values of each report.
    """

    def __init__(self) -> None:
        self.listeners: list[Callable[[int, Mapping[str, float]], None]] = []
        self._reports: deque[_Report] = deque()

    def forget(self) -> None:
        """Drops reports that have not arrived; listeners stay."""
        self._reports.clear()

    def report(
        self,
        peers: Peers,
        step: int,
        epoch: int,
        names: Sequence[str],
        known: Mapping[str, float | Tensor],
        logged: Collection[str] = (),
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Reports the values of a batch that this worker knows.

        Several workers may know a value; its mean is logged.

        Args:
            peers: all workers.
            step: the number of the batch.
            epoch: the number of the epoch.
            names: of all values, the same at all workers.
            known: the values of this worker.
            logged: names that this worker has logged already.
            weights: of the values of this worker in the mean; 1 for those that it does not name.
        """
        weigh = {**dict.fromkeys(known, 1.0), **(weights or {})}
        numbers = [float(known[name]) * weigh[name] if name in known else 0.0 for name in names]
        numbers += [weigh[name] if name in known else 0.0 for name in names]
        self._reports.append(_Report(step, epoch, names, peers.total(numbers), logged))

    def write(self, module: pl.LightningModule, wait: bool = False, hidden: Collection[str] = ()) -> None:
        """Logs the reports that have arrived.

        Args:
            module: has the Trainer with its loggers.
            wait: whether to wait for all reports.
            hidden: names that are not passed to callbacks and the progress bar, because others log them for these.
        """
        newest: dict[str, float] = {}
        while self._reports and (wait or self._reports[0].sums.ready()):
            report = self._reports.popleft()
            values = report.values()
            for listener in self.listeners:
                listener(report.step, values)
            new = {name: value for name, value in values.items() if name not in report.logged}
            for logger in module.trainer.loggers:
                logger.log_metrics({"epoch": float(report.epoch), **new}, report.step)
                logger.save()
            newest |= values
        for name, value in newest.items():
            if name in hidden:
                continue
            # For callbacks and the progress bar; loggers have it already, at the right step. Only the newest value,
            # because Lightning would take the mean of several at the end of an epoch.
            module.log(name, value, prog_bar=name in SHOWN, logger=False)
