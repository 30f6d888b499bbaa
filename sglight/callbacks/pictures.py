"""What all figures have in common: colours, layout, and how they are written to files and to TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger

from sglight.config.schema import MODELS
from sglight.files import replacing
from sglight.strategies.staged import StagedModule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito 2008: these can be told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GUIDE: dict[str, Any] = {"color": "#777777", "linewidth": 0.8, "linestyle": ":"}  # a line to compare with


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure of ``width`` x ``height`` inches. It is not registered with `matplotlib.pyplot`."""
    # Imported here, because matplotlib takes half a second to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def tidy(axes: Axes, label: str) -> None:
    """Gives a panel of curves its label, a light grid, and no frame at the top and the right."""
    axes.set_ylabel(label)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def run_name(trainer: pl.Trainer, module: StagedModule) -> str:
    """The data set, model and strategy of a run, for titles: ``digits-hamiltonian-dni``."""
    data: str = getattr(trainer.datamodule, "name", "data")  # type: ignore[attr-defined]
    dynamics = module.spec.dynamics.rpartition(".")[2]
    return f"{data}-{MODELS.get(dynamics, dynamics)}-{type(module).__name__.lower()}"


def publish(trainer: pl.Trainer, figure: Figure, folder: Path | None, name: str) -> None:
    """Writes ``<name>.png`` into a folder, and ``figures/<name>`` to each TensorBoard logger.

    Args:
        trainer: has the loggers.
        figure: to be written.
        folder: None for ``figures`` in the run folder.
        name: of the figure.
    """
    path = (folder or Path(trainer.default_root_dir, "figures")) / f"{name}.png"
    save_figure(figure, path)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # The pixels of the file: `add_figure` would draw the figure once more.
            picture = np.asarray(Image.open(path).convert("RGB"))
            logger.experiment.add_image(f"figures/{name}", picture, trainer.global_step, dataformats="HWC")


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG; if that fails, a file that was there stays as it was."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
