"""How well the estimators predict true gradients, by boundary and over the training, as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from sglight.callbacks.figures import publish
from sglight.gradients.base import COMPARED
from sglight.strategies.staged import StagedModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What an estimator of the true gradient itself would have.
PERFECT = dict(zip(COMPARED, (1.0, 0.0, 1.0, 1.0), strict=True))
# Of a kind of comparison and a boundary: batch numbers and values.
History = dict[str, list[tuple[int, float]]]


class GradientQuality(Callback):
    """Draws ``gradient_quality.png``, also into TensorBoard, at the end of a training with estimators.

    The comparisons are the strategy's own, ``strategy.diagnose_every_n_batches`` says how often, and the curves
    ``estimator_*/cosine`` and so on are there without this callback.

    Args:
        folder: of the figure.

    Attributes:
        history: of each curve the batches and values so far, by its name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history: History = {}
        self._earlier: History | None = None

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Of a checkpoint, or of this Trainer's training before; nothing of another one.
        earlier, self._earlier = self.history if self._earlier is None else self._earlier, None
        before = {name: [p for p in points if p[0] < trainer.global_step] for name, points in earlier.items()}
        self.history = {name: points for name, points in before.items() if points}
        self._stop_listening(pl_module)
        if isinstance(pl_module, StagedModule):
            pl_module.curves.listeners.append(self._hear)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_listening(pl_module)
        if self.history and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            publish(trainer, draw(self.history), self.folder, "gradient_quality")

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._stop_listening(pl_module)

    def _stop_listening(self, module: pl.LightningModule) -> None:
        if isinstance(module, StagedModule) and self._hear in module.curves.listeners:
            module.curves.listeners.remove(self._hear)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Lightning loads states for a test as well; only a training takes it over.
        history = state_dict.get("history", {})  # not there if another version has written it
        self._earlier = {name: [(t, v) for t, v in points] for name, points in history.items()}

    def _hear(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if re.fullmatch(rf"estimator_\d+/({'|'.join(COMPARED)})", name):
                self.history.setdefault(name, []).append((step, value))


def draw(history: History) -> Figure:
    """A panel for each kind of comparison, a curve for each boundary; what would be perfect is dotted."""
    # matplotlib takes half a second to import.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    boundaries = sorted({int(name.partition("/")[0].removeprefix("estimator_")) for name in history})
    shades = colormaps["viridis"]
    figure = Figure(figsize=(8, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("synthetic against true gradients, one batch each", fontsize=11)
    panels = figure.subplots(len(COMPARED), 1, sharex=True)
    for axes, kind in zip(panels, COMPARED, strict=True):
        for place, i in enumerate(boundaries):
            points = history.get(f"estimator_{i}/{kind}", [])
            axes.plot(
                [step for step, _ in points], [value for _, value in points],
                color=shades(0.9 * place / max(len(boundaries) - 1, 1)),
                marker="o", markersize=3, linewidth=1.2, label=f"behind stage {i}",
            )  # fmt: skip
        axes.axhline(PERFECT[kind], color="#777777", linewidth=0.8, linestyle=":")
        axes.set_ylabel(kind.replace("_", " "))
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("batch")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=8
    )
    return figure
