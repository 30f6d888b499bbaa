"""Figures of the quality of gradients over the training: those that stages use, against exact ones."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from sglight.callbacks.pictures import GUIDE, new_figure, publish, run_name, tidy
from sglight.gradients.base import COMPARED
from sglight.strategies.diagnosis import MEASURED
from sglight.strategies.staged import StagedModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The values of a perfect gradient.
PERFECT = dict(zip(COMPARED, (1.0, 0.0, 1.0, 1.0), strict=True)) | {"staleness": 0.0}
# Figure: (prefix of its curves, kinds of comparison, label of a curve, title)
PICTURES: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "gradient_quality": (
        "boundary",
        COMPARED,
        "after stage {}",
        "gradients that stages use at boundaries, compared with exact ones on one batch",
    ),
    "stage_gradients": (
        "stage",
        MEASURED,
        "stage {}",
        "gradients of stages, compared with exact ones on one batch",
    ),
}
KNOWN = re.compile("|".join(rf"{part}_\d+/({'|'.join(kinds)})" for part, kinds, *_ in PICTURES.values()))
# The points (batch, value) of each curve.
History = dict[str, list[tuple[int, float]]]


class GradientQuality(Callback):
    """Draws ``gradient_quality.png`` and ``stage_gradients.png`` at the end of a training.

    The strategy makes the comparisons, every ``strategy.diagnose_every_n_batches`` batches, and logs them as
    ``boundary_*/cosine``, ``stage_*/cosine`` and so on, with or without this callback.

    Args:
        folder: of the figures.

    Attributes:
        history: the points of each curve so far, by its name.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.history: History = {}
        self._earlier: History | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Continues the history of the checkpoint, or of an earlier training by this Trainer.
        earlier, self._earlier = self.history if self._earlier is None else self._earlier, None
        before = {name: [p for p in points if p[0] < trainer.global_step] for name, points in earlier.items()}
        self.history = {name: points for name, points in before.items() if points}
        self._stop_listening(pl_module)
        if isinstance(pl_module, StagedModule):
            pl_module.curves.listeners.append(self._record)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_listening(pl_module)
        if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
            return
        assert isinstance(pl_module, StagedModule)
        for picture, (part, *_) in PICTURES.items():
            if any(name.startswith(f"{part}_") for name in self.history):
                publish(
                    trainer,
                    draw(self.history, picture, f"{run_name(trainer, pl_module)}: "),
                    self.folder,
                    picture,
                )

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop_listening(pl_module)

    def _stop_listening(self, module: pl.LightningModule) -> None:
        if isinstance(module, StagedModule) and self._record in module.curves.listeners:
            module.curves.listeners.remove(self._record)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Only kept here: Lightning loads states for a test as well, but only a training uses them.
        history = state_dict.get("history", {})  # another version may not have written it
        self._earlier = {name: [(t, v) for t, v in points] for name, points in history.items()}

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if KNOWN.fullmatch(name):
                self.history.setdefault(name, []).append((step, value))


def draw(history: History, picture: str = "gradient_quality", run: str = "") -> Figure:
    """A panel for each kind of comparison, with a curve for each boundary or stage.

    Args:
        history: the points of the curves.
        picture: a key of `PICTURES`.
        run: the beginning of the title.
    """
    from matplotlib import colormaps

    part, kinds, label, title = PICTURES[picture]
    numbers = sorted(
        {int(name.partition("/")[0][len(part) + 1 :]) for name in history if name.startswith(f"{part}_")}
    )
    shades = colormaps["viridis"]
    figure = new_figure(8, 2 * len(kinds), f"{run}\n{title}".strip())
    panels = figure.subplots(len(kinds), 1, sharex=True)
    for axes, kind in zip(panels, kinds, strict=True):
        for place, i in enumerate(numbers):
            points = history.get(f"{part}_{i}/{kind}", [])
            axes.plot(
                [step for step, _ in points], [value for _, value in points],
                color=shades(0.9 * place / max(len(numbers) - 1, 1)),
                marker="o", markersize=3, linewidth=1.2, label=label.format(i),
            )  # fmt: skip
        axes.axhline(PERFECT[kind], **GUIDE)
        # 0.9999, not 0.0001 less than a number above the axis.
        axes.ticklabel_format(axis="y", useOffset=False)
        tidy(axes, kind.replace("_", " "))
    panels[-1].set_xlabel("batch")
    panels[-1].xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure
