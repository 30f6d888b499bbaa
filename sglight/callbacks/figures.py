"""Pictures of a network on planar data: its decision regions, and the ways of the points through its layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from typing_extensions import override

from sglight.config.schema import MODELS
from sglight.data.planar import PlanarData
from sglight.files import replacing
from sglight.networks import Segment
from sglight.strategies.staged import StagedModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID_CELLS = 300  # along the longer side of the decision regions
CHUNK = 16384  # points that pass the network at once
SPLIT = "val"


class PlanarFigures(Callback):
    """Draws ``decision.png`` and ``trajectories.png``, and both into TensorBoard; other than planar data is left alone.

    Shown are the validation points and the network of that moment. The files show the newest state, TensorBoard
    keeps all of them.

    Args:
        folder: of the files.
        every_n_epochs: how often to draw during the training; None for at its end only.
        points: the largest number of points to draw. paths: the same for trajectories.
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
    # matplotlib takes half a second to import: only runs on planar data pay for it.
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
        f"{name or data.name}, {_epochs(epochs)}:\n"
        f"decision regions, {accuracy:.1%} of {len(x)} validation points right",
    )


def trajectory_figure(
    module: StagedModule, data: PlanarData, epochs: int, limit: int, name: str = ""
) -> "Figure":
    """The ways of at most ``limit`` points through the layers."""
    from sglight.callbacks.drawing import Paths, draw_trajectories

    x, y = data.points(SPLIT)
    times, states = trajectories(module, normalised(x, data))
    finite = states.isfinite().all(2).all(0)
    plane, axes = project(states[:, finite])
    chosen = spread(int(finite.sum()), limit)
    title = f"{name or data.name}, {_epochs(epochs)}: trajectories through {module.spec.total_steps} steps"
    if not finite.all():
        title += f" ({int((~finite).sum())} points, not finite, are left out)"
    return draw_trajectories(
        Paths(plane[:, chosen].numpy(), times.numpy(), y[finite][chosen].numpy(), data.class_names, axes),
        title,
    )


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation without gradients that leaves each part in the mode in which it was."""
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
    """Points of the plane [N, 2] as the network takes them."""
    std = torch.tensor(data.std, dtype=x.dtype)
    return (x - torch.tensor(data.mean, dtype=x.dtype)) / torch.where(std > 0, std, torch.ones_like(std))


def probabilities(module: StagedModule, x: Tensor) -> Tensor:
    """Class probabilities [N, K] of inputs [N, 2], float64 on the CPU; equal ones where logits are not finite."""
    like = next(module.stages.parameters())
    logits = torch.cat([module(part.to(like)).cpu().double() for part in x.split(CHUNK)])
    chances = logits.softmax(1)
    return torch.where(chances.isfinite().all(1, keepdim=True), chances, 1 / chances.shape[1])


def trajectories(module: StagedModule, x: Tensor) -> tuple[Tensor, Tensor]:
    """Times [T + 1] and the field y [T + 1, N, C] there of inputs [N, 2], in float64 on the CPU.

    Segments narrower than the widest are filled with zeros, as the connector ``pad`` does it.
    """
    times, fields = [0.0], list[Tensor]()
    state = x.to(next(module.stages.parameters()))
    for _, stage in module.own_stages():
        states = stage.trajectory(state)
        # A stage begins with the state that ended the one before it.
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
    """States [T + 1, N, C] in the plane, and what its axes are: the states' own two, or principal components.

    The components are those of the states at all times together, so that one plane shows all of the way.
    """
    if states.shape[2] == 2 or states.shape[1] == 0:
        return states[..., :2], ("$y_1$", "$y_2$")
    flat = states.flatten(0, 1)
    centred = flat - flat.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    plane = directions[:, [-1, -2]]
    # Eigenvectors have no sign of their own: the largest entry is to be positive, so that figures compare.
    plane = plane * plane.gather(0, plane.abs().argmax(0, keepdim=True)).sign()
    share = (variances / variances.sum().clamp_min(1e-300)).flip(0)
    names = (
        f"{which} principal component of $y$ at all times ({part:.0%} of the variance)"
        for which, part in zip(("first", "second"), share.tolist(), strict=False)
    )
    return (centred @ plane).unflatten(0, states.shape[:2]), tuple(names)  # type: ignore[return-value]


def spread(count: int, limit: int) -> Tensor:
    """At most ``limit`` of ``count`` indices, evenly spread: classes lie one behind the other in the data."""
    return torch.linspace(0, count - 1, min(count, limit)).round().long()


def run_name(trainer: pl.Trainer, module: StagedModule) -> str:
    """What a figure is of: ``digits-hamiltonian-dni``, by data, model and strategy."""
    data: str = getattr(trainer.datamodule, "name", "data")  # type: ignore[attr-defined]
    dynamics = module.spec.dynamics.rpartition(".")[2]
    return f"{data}-{MODELS.get(dynamics, dynamics)}-{type(module).__name__.lower()}"


def publish(trainer: pl.Trainer, figure: "Figure", folder: Path | None, name: str) -> None:
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


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG such that it is either whole or as it was."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"
