"""Measures during the training how stable the network is, on a few samples."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from sglight import units
from sglight.callbacks.figures import spread
from sglight.callbacks.pictures import COLOURS, GUIDE, new_figure, publish, run_name, tidy
from sglight.networks import Stage
from sglight.networks.network import share
from sglight.networks.stability import Stability, analyse
from sglight.strategies.staged import StagedModule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class StabilityMonitor(Callback):
    """Every n epochs, measures the stability of the network, logs it under ``stability/`` and draws it by depth.

    Worker 0 analyses a copy of the whole network, so that the training is not disturbed. The figure ``stability.png``
    shows the newest state; TensorBoard keeps all of them.

    Args:
        folder: of the figure.
        every_n_epochs: n.
        samples: how many, taken from the first validation batch.
        exact_up_to, iterations: see `sglight.networks.stability.analyse`.

    Attributes:
        latest: the last result, at worker 0.
    """

    def __init__(
        self,
        folder: Path | None = None,
        every_n_epochs: int = 1,
        samples: int = 8,
        exact_up_to: int = 256,
        iterations: int = 12,
    ) -> None:
        self.folder = folder
        self.every_n_epochs = every_n_epochs
        self.samples = samples
        self.exact_up_to, self.iterations = exact_up_to, iterations
        self.latest: Stability | None = None
        self._batch: tuple[Tensor | None, Tensor] | None = None

    def metrics(self) -> dict[str, float]:
        """The last `measures` of the whole network, without those of single steps."""
        found = measures(self.latest) if self.latest is not None else {}
        return {name: value for name, value in found.items() if "/step_" not in name}

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batch, self.latest = None, None

    @override
    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._batch is None and not trainer.sanity_checking:
            x, labels = batch
            chosen = spread(len(labels), self.samples).to(labels.device)
            self._batch = None if x is None else x[chosen], labels[chosen]

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        # The same at all workers: either all have seen a validation batch or none has.
        if self._batch is None or epochs % self.every_n_epochs or getattr(trainer, "fast_dev_run", False):
            return
        assert isinstance(pl_module, StagedModule)
        network = assembled(pl_module)
        if network is None:
            return
        x, labels = self._batch
        assert x is not None, "worker 0 has the first stage, so it gets the samples"
        like = next(pl_module.parameters())
        self.latest = analyse(
            network.to(like.device), x.to(like), labels.to(like.device), self.exact_up_to, self.iterations
        )
        for logger in trainer.loggers:
            logger.log_metrics(measures(self.latest), trainer.global_step - 1)
        after, sampled = (
            units.plural(epochs, "epoch"),
            units.plural(len(labels), "validation sample"),
        )
        title = f"{run_name(trainer, pl_module)}: stability by depth, {after}, {sampled}"
        publish(trainer, draw(self.latest, title), self.folder, "stability")


def measures(found: Stability) -> dict[str, float]:
    """The numbers in a `Stability` by name; the norms of step j are those after it."""
    values: dict[str, float | None] = {
        "stability/growth": found.growth[-1],
        "stability/flow_sigma_max": found.flow_sigma_max,
        "stability/reversal_error": found.reversal_error,
    }
    for j, step in enumerate(found.steps):
        values |= {
            f"stability/step_{j}/sigma_max": step.sigma_max,
            f"stability/step_{j}/sigma_min": step.sigma_min,
            f"stability/step_{j}/spectral_radius": step.radius,
            f"stability/step_{j}/state_norm": found.state_norm[j + 1],
            f"stability/step_{j}/gradient_norm": found.gradient_norm[j + 1],
        }
    return {name: value for name, value in values.items() if value is not None}


def assembled(module: StagedModule) -> Stage | None:
    """A copy of the whole network at worker 0, None at the others; every worker must call it."""
    gathered = module.placement.peers.gather({i: stage.state_dict() for i, stage in module.own_stages()})
    if not gathered:
        return None
    bounds, whole = list(pairwise(module.cuts)), Stage(module.spec)
    whole.to(next(module.parameters()).dtype)
    for states in gathered:
        for i, state in states.items():
            share(whole, Stage(module.spec, *bounds[i])).load_state_dict(state)
    return whole.eval().requires_grad_(False)


def draw(found: Stability, title: str) -> Figure:
    """Singular values, growth of a perturbation, and norms of states and gradients, over the time steps."""
    figure = new_figure(8, 9, title)
    panels = figure.subplots(4, 1, sharex=True)
    steps, between = range(1, len(found.steps) + 1), range(len(found.steps) + 1)
    spectra = {"largest": [s.sigma_max for s in found.steps]}
    if all(s.sigma_min is not None for s in found.steps):
        spectra |= {
            "smallest": [s.sigma_min or 0.0 for s in found.steps],
            "spectral radius": [s.radius or 0.0 for s in found.steps],
        }
    _panel(panels[0], f"singular values of a step\n(of all: {found.flow_sigma_max:.3g})", steps, spectra)
    panels[0].axhline(1, **GUIDE)
    _panel(panels[1], "growth of a\nperturbation", between, {"": found.growth})
    _panel(panels[2], "norm of the state", between, {"": found.state_norm})
    _panel(panels[3], "norm of the gradient", between, {"": found.gradient_norm})
    reversal = (
        ""
        if found.reversal_error is None
        else f" (relative error of the reversal {found.reversal_error:.1e})"
    )
    panels[3].set_xlabel(f"time steps passed{reversal}")
    panels[3].xaxis.get_major_locator().set_params(integer=True)
    return figure


def _panel(axes: Axes, name: str, places: range, curves: dict[str, list[float]]) -> None:
    """Draws curves by label over ``places``; on a logarithmic axis if their values differ by much."""
    for (label, values), colour, mark in zip(curves.items(), COLOURS, "os^", strict=False):
        axes.plot(places, values, color=colour, marker=mark, markersize=3.5, linewidth=1.2, label=label)
    positive = [v for values in curves.values() for v in values if 0 < v < torch.inf]
    if positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log", nonpositive="mask")
    tidy(axes, name)
    if len(curves) > 1:
        axes.legend(
            frameon=False, fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0
        )
