"""A Hydra callback that writes the page of a sweep after its last job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from typing_extensions import override

from sglight.report.__main__ import main


class DrawSweep(Callback):
    """Prints the comparison of the runs of a sweep, and writes ``report.html`` into its folder.

    A preset uses it by ``hydra: {callbacks: {draw: {_target_: sglight.report.drawing.DrawSweep}}}``.
    """

    @override
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        main([str(folder), "--html", str(folder / "report.html")])
