"""Builds the loggers of a run, and a CSV logger that keeps earlier rows when a run is resumed."""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger
from typing_extensions import override

from sglight.config.extension import instantiate
from sglight.errors import UserError


def build_loggers(
    nodes: Mapping[str, Mapping[str, Any]], folder: Path, batches_before: int = 0
) -> list[Logger]:
    """The loggers of a run.

    Args:
        nodes: of the config group ``logger``, each with ``_target_``; ``save_dir: null`` means the run folder.
        folder: of the run.
        batches_before: how many batches were trained before the run was resumed; their rows are kept.

    Raises:
        UserError: if one cannot be built.
    """
    loggers = list[Logger]()
    for name, node in nodes.items():
        here = {"save_dir": str(folder)} if "save_dir" in node and node["save_dir"] is None else {}
        loggers.append(instantiate({**node, **here}, f"logger.{name}", Logger))
    for logger in loggers:
        if isinstance(logger, TableLogger):
            logger.keep(batches_before)
    return loggers


@contextmanager
def beginning() -> Iterator[None]:
    """Context in which loggers begin; what wandb refuses, as without a login, becomes one sentence."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(f"logger=wandb: {reason}; or add logger.wandb.offline=true") from error


def finish_loggers() -> None:
    """Close a run of wandb, which the next run of a sweep in this process would continue otherwise."""
    wandb: Any = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish()


class TableLogger(CSVLogger):
    """Lightning's `CSVLogger`, which writes ``metrics.csv`` directly into its folder.

    Args:
        save_dir: the folder.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__(save_dir, name="", version="")
        self._kept = list[dict[str, Any]]()

    def keep(self, batches: int) -> None:
        """Keep the rows of the first ``batches`` batches in the present file."""
        self._kept = list(_rows_before(Path(self.save_dir) / "metrics.csv", batches))

    @property
    @override
    def experiment(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning warns that the earlier file is deleted
            writer = super().experiment
        kept, self._kept = self._kept, []
        if kept and hasattr(writer, "metrics"):  # only at worker 0
            writer.metrics[:0] = kept
        return writer


def _rows_before(path: Path, batches: int) -> Iterator[dict[str, Any]]:
    if batches and path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if (row.get("step") or "").isdigit() and int(row["step"]) < batches:
                    yield {key: value for key, value in row.items() if key and value}
