"""Figures of a network on planar data: its decision regions, and the trajectories of points through its layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from sglight import units
from sglight.callbacks.pictures import publish, run_name
from sglight.data.planar import PlanarData
from sglight.networks import Segment
from sglight.strategies.staged import StagedModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID_CELLS = 300  # along the longer side of the decision regions
CHUNK = 16384  # points in a batch
SPLIT = "val"


class PlanarFigures(Callback):
    """Draws ``decision.png`` and ``trajectories.png`` of the validation points, if the data are planar.

    The files show the newest state of the network; TensorBoard keeps all of them.

    Args:
        folder: of the files.
        every_n_epochs: how often to draw during the training; None for once, at its end.
        points: the largest number of points to draw.
        paths: the largest number of trajectories to draw.
    """

    def __init__(
        self,
        folder: Path | None = None,
        every_n_epochs: int | None = None,
        points: int = 1000,
        paths: int = 150,
    ) -> None:
        self.folder = folder
        self.every_n_epochs = every_n_epochs
        self.points, self.paths = points, paths
        self._drawn_at: int | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._drawn_at = None

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epochs = trainer.current_epoch + 1
        if self.every_n_epochs and epochs % self.every_n_epochs == 0:
            self._draw(trainer, pl_module, epochs)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._drawn_at != trainer.global_step:
            self._draw(trainer, pl_module, trainer.current_epoch)

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule, epochs: int) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if getattr(trainer, "fast_dev_run", False) or not trainer.is_global_zero:
            return
        if not isinstance(data, PlanarData) or not isinstance(module, StagedModule) or not holds_all(module):
            return
        with undisturbed(module):
            figures = {
                "decision": decision_figure(module, data, epochs, self.points, run_name(trainer, module)),
                "trajectories": trajectory_figure(
                    module, data, epochs, self.paths, run_name(trainer, module)
                ),
            }
        for name, figure in figures.items():
            publish(trainer, figure, self.folder, name)
        self._drawn_at = trainer.global_step


def decision_figure(
    module: StagedModule, data: PlanarData, epochs: int, limit: int, name: str = ""
) -> "Figure":
    """Decision regions of the network, with at most ``limit`` points over them."""
    # Imported here, because matplotlib takes half a second to import.
    from sglight.callbacks.drawing import Cloud, Regions, draw_decision

    x, y = data.points(SPLIT)
    predicted = probabilities(module, normalised(x, data)).argmax(1)
    accuracy = float((predicted == y).double().mean())
    grid, shape, extent = Regions.around(x.double().numpy(), GRID_CELLS)
    chances = probabilities(module, normalised(torch.from_numpy(grid), data))
    chosen = spread(len(x), limit)
    return draw_decision(
        Cloud(x[chosen].numpy(), y[chosen].numpy(), data.class_names),
        Regions(chances.view(*shape, -1).numpy(), extent),
        predicted[chosen].numpy(),
        f"{name or data.name}, {units.plural(epochs, 'epoch')}:\n"
        f"decision regions, {units.percent(accuracy)} of {len(x)} validation points right",
    )


def trajectory_figure(
    module: StagedModule, data: PlanarData, epochs: int, limit: int, name: str = ""
) -> "Figure":
    """The trajectories of at most ``limit`` points through the layers."""
    from sglight.callbacks.drawing import Paths, draw_trajectories

    x, y = data.points(SPLIT)
    times, states = trajectories(module, normalised(x, data))
    finite = states.isfinite().all(2).all(0)
    plane, axes = project(states[:, finite])
    chosen = spread(int(finite.sum()), limit)
    steps, after = units.plural(module.spec.total_steps, "step"), units.plural(epochs, "epoch")
    title = f"{name or data.name}, {after}: trajectories through {steps}"
    if not finite.all():
        title += f" ({int((~finite).sum())} points, not finite, are left out)"
    return draw_trajectories(
        Paths(plane[:, chosen].numpy(), times.numpy(), y[finite][chosen].numpy(), data.class_names, axes),
        title,
    )


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Context for an evaluation without gradients, after which each part has its training mode again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def holds_all(module: StagedModule) -> bool:
    """Whether all stages are in this process."""
    return len(list(module.own_stages())) == len(module.cuts) - 1


def normalised(x: Tensor, data: PlanarData) -> Tensor:
    """Points of the plane [N, 2], normalised as for the network."""
    std = torch.tensor(data.std, dtype=x.dtype)
    return (x - torch.tensor(data.mean, dtype=x.dtype)) / torch.where(std > 0, std, torch.ones_like(std))


def probabilities(module: StagedModule, x: Tensor) -> Tensor:
    """Class probabilities [N, K] of inputs [N, 2], float64 on the CPU; 1/K where logits are not finite."""
    like = next(module.stages.parameters())
    logits = torch.cat([module(part.to(like)).cpu().double() for part in x.split(CHUNK)])
    chances = logits.softmax(1)
    return torch.where(chances.isfinite().all(1, keepdim=True), chances, 1 / chances.shape[1])


def trajectories(module: StagedModule, x: Tensor) -> tuple[Tensor, Tensor]:
    """The times [T + 1], and the field y [T + 1, N, C] of inputs [N, 2] at these times, in float64 on the CPU.

    The states of narrow segments are padded with zeros to the width C of the widest, as by the connector ``pad``.
    """
    times, fields = [0.0], list[Tensor]()
    state = x.to(next(module.stages.parameters()))
    for _, stage in module.own_stages():
        states = stage.trajectory(state)
        # The first state of a stage is the last one of the stage before it.
        fields += [
            s.chunk(module.spec.rule.fields, 1)[0].cpu().double() for s in states[1 if fields else 0 :]
        ]
        state = states[-1]
        for part in stage.flow():
            now = times[-1]
            times += (
                [now + part.step_size * (j + 1) for j in range(part.steps)]
                if isinstance(part, Segment)
                else [now]
            )
    width = max(2, *(y.shape[1] for y in fields))
    padded = [nn.functional.pad(y, (0, width - y.shape[1])) for y in fields]
    return torch.tensor(times, dtype=torch.float64), torch.stack(padded)


def project(states: Tensor) -> tuple[Tensor, tuple[str, str]]:
    """Projects states [T + 1, N, C] to a plane [T + 1, N, 2]; returns the names of its axes as well.

    States of two channels are not changed. Others are projected to their first two principal components, over all times
    together, so that one plane shows whole trajectories.
    """
    if states.shape[2] == 2 or states.shape[1] == 0:
        return states[..., :2], ("$y_1$", "$y_2$")
    flat = states.flatten(0, 1)
    centred = flat - flat.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    plane = directions[:, [-1, -2]]
    # The sign of an eigenvector is arbitrary: its largest entry is made positive, so that figures can be compared.
    plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
    share = (variances / variances.sum().clamp_min(1e-300)).flip(0)
    names = (
        f"{which} principal component of $y$ at all times ({units.share(part)} of the variance)"
        for which, part in zip(("first", "second"), share.tolist(), strict=False)
    )
    return (centred @ plane).unflatten(0, states.shape[:2]), tuple(names)  # type: ignore[return-value]


def spread(count: int, limit: int) -> Tensor:
    """At most ``limit`` of the indices 0 ... ``count`` - 1, evenly spaced, because data may be sorted by class.

    >>> spread(101, 3)
    tensor([  0,  50, 100])
    """
    return torch.linspace(0, count - 1, min(count, limit)).round().long()
