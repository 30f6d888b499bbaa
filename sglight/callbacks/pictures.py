"""What all pictures of a run share: a figure without pyplot, plain axes, and where it is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger

from sglight.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, title: str | None = None) -> Figure:
    """An empty figure of so many inches; nothing global of matplotlib is touched."""
    # matplotlib takes half a second to import: only runs that draw pay for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    return figure


def tidy(axes: Axes, grid: bool = True) -> None:
    """Axes without a frame at the top and the right, with faint grid lines."""
    if grid:
        axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def publish(trainer: pl.Trainer, figure: Figure, folder: Path | None, name: str) -> None:
    """Write ``<name>.png`` into the folder and ``figures/<name>`` into TensorBoard, if that is a logger.

    Args:
        folder: None for ``figures`` in the run's folder.
    """
    path = (folder or Path(trainer.default_root_dir, "figures")) / f"{name}.png"
    save_figure(figure, path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # From the file: `add_figure` would draw it once more.
            picture = np.asarray(Image.open(path).convert("RGB"))
            logger.experiment.add_image(f"figures/{name}", picture, trainer.global_step, dataformats="HWC")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG such that it is either whole or as it was."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
