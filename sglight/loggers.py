"""Loggers, from the nodes of ``logger``; one that writes a table keeps the rows of the training before."""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger
from typing_extensions import override

from sglight.config.extension import instantiate


def build_loggers(
    nodes: Mapping[str, Mapping[str, Any]], folder: Path, batches_before: int = 0
) -> list[Logger]:
    """The loggers of a run.

    Args:
        nodes: by name, each with ``_target_``; ``save_dir: null`` stands for the run's folder.
        folder: of the run.
        batches_before: those of a training that goes on; what is logged of them stays.
    """
    loggers = list[Logger]()
    for name, node in nodes.items():
        here = {"save_dir": str(folder)} if "save_dir" in node and node["save_dir"] is None else {}
        loggers.append(instantiate({**node, **here}, f"logger.{name}", Logger))
    for logger in loggers:
        if isinstance(logger, TableLogger):
            logger.keep(batches_before)
    return loggers


def finish_loggers() -> None:
    """End what loggers leave open for the whole process: the next run of a sweep would go on with wandb's."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


class TableLogger(CSVLogger):
    """Lightning's `CSVLogger`, writing ``metrics.csv`` straight into its folder.

    Args:
        save_dir: the folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__(save_dir, name="", version="")
        self._kept = list[dict[str, Any]]()

    def keep(self, batches: int) -> None:
        """Keep the rows of the first ``batches`` that the file has now."""
        self._kept = list(_rows_before(Path(self.save_dir) / "metrics.csv", batches))

    @property
    @override
    def experiment(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that earlier files are deleted
            writer = super().experiment
        kept, self._kept = self._kept, []
        if kept and hasattr(writer, "metrics"):  # not on other workers
            writer.metrics[:0] = kept
        return writer


def _rows_before(path: Path, batches: int) -> Iterator[dict[str, Any]]:
    if batches and path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if (row.get("step") or "").isdigit() and int(row["step"]) < batches:
                    yield {key: value for key, value in row.items() if key and value}
