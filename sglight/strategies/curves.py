"""Values of single batches on their way to the log, from all workers to the first, without a lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import pytorch_lightning as pl
from torch import Tensor

from sglight.link import Peers, Pending

SHOWN = ("train/loss", "train/acc")  # beside the progress bar


@dataclass
class _Report:
    """What all workers say of one batch: the sums of weighted values, and of the weights, 0 for what is not known."""

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

    Nobody waits for a report, since that would lock the workers to each other: it is written when it has arrived,
    under the number of the batch that it is of.

    Attributes:
        listeners: called on every worker with each report's batch number and values.
    """

    def __init__(self) -> None:
        self.listeners: list[Callable[[int, Mapping[str, float]], None]] = []
        self._reports: deque[_Report] = deque()

    def forget(self) -> None:
        """Drop reports that have not arrived; listeners stay."""
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
        """Say what is known here of a batch; all workers name the same ``names``.

        Of what several workers know, the mean is taken, by their ``weights``, which are 1 if not given. Those that are
        ``logged`` need not be written here again.
        """
        weigh = {**dict.fromkeys(known, 1.0), **(weights or {})}
        numbers = [float(known[name]) * weigh[name] if name in known else 0.0 for name in names]
        numbers += [weigh[name] if name in known else 0.0 for name in names]
        self._reports.append(_Report(step, epoch, names, peers.total(numbers), logged))

    def write(self, module: pl.LightningModule, wait: bool = False, told: Collection[str] = ()) -> None:
        """Log the reports that have arrived, or (``wait``) all of them; callbacks are ``told`` some by others."""
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
            if name in told:
                continue
            # For callbacks and the bar; the loggers have it already, at the right step. Only the newest: of several,
            # Lightning would take the mean at an epoch's end.
            module.log(name, value, prog_bar=name in SHOWN, logger=False)
