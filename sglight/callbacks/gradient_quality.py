"""How good the gradients are that stages use, and estimates, over the training, as pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from typing_extensions import override

from sglight.callbacks.figures import publish, run_name
from sglight.gradients.base import COMPARED
from sglight.strategies.diagnosis import MEASURED
from sglight.strategies.staged import StagedModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the exact gradient itself would have.
PERFECT = dict(zip(COMPARED, (1.0, 0.0, 1.0, 1.0), strict=True)) | {"staleness": 0.0}
# By picture: whose curves, which kinds of them, how one is called, and the title.
PICTURES: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "gradient_quality": (
        "boundary",
        COMPARED,
        "behind stage {}",
        "gradients at boundaries that stages use against exact ones, one batch each",
    ),
    "stage_gradients": (
        "stage",
        MEASURED,
        "stage {}",
        "gradients that stages use against exact ones, one batch each",
    ),
}
KNOWN = re.compile("|".join(rf"{part}_\d+/({'|'.join(kinds)})" for part, kinds, *_ in PICTURES.values()))
# Of a kind of comparison and a boundary: batch numbers and values.
History = dict[str, list[tuple[int, float]]]


class GradientQuality(Callback):
    """Draws ``gradient_quality.png`` and ``stage_gradients.png``, also into TensorBoard, at the end of a training.

    The comparisons are the strategy's own, ``strategy.diagnose_every_n_batches`` says how often, and the curves
    ``boundary_*/cosine``, ``stage_*/cosine`` and so on are there without this callback.

    Args:
        folder: of the figure.

    Attributes:
        history: of each curve the batches and values so far, by its name.
    """

    def __init__(self, folder: Path | None = None) -> None:
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
            if KNOWN.fullmatch(name):
                self.history.setdefault(name, []).append((step, value))


def draw(history: History, picture: str = "gradient_quality", of: str = "") -> Figure:
    """A panel for each kind of comparison, a curve for each boundary or stage; what would be perfect is dotted."""
    # matplotlib takes half a second to import.
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    part, kinds, called, title = PICTURES[picture]
    numbers = sorted(
        {int(name.partition("/")[0][len(part) + 1 :]) for name in history if name.startswith(f"{part}_")}
    )
    shades = colormaps["viridis"]
    figure = Figure(figsize=(8, 2 * len(kinds)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{of}\n{title}".strip(), fontsize=11)
    panels = figure.subplots(len(kinds), 1, sharex=True)
    for axes, kind in zip(panels, kinds, strict=True):
        for place, i in enumerate(numbers):
            points = history.get(f"{part}_{i}/{kind}", [])
            axes.plot(
                [step for step, _ in points], [value for _, value in points],
                color=shades(0.9 * place / max(len(numbers) - 1, 1)),
                marker="o", markersize=3, linewidth=1.2, label=called.format(i),
            )  # fmt: skip
        axes.axhline(PERFECT[kind], color="#777777", linewidth=0.8, linestyle=":")
        axes.set_ylabel(kind.replace("_", " "))
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("batch")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return figure
