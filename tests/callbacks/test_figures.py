"""Figures are drawn for planar data, whole, and leave the training as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sglight.callbacks.figures import (
    PlanarFigures,
    decision_figure,
    project,
    spread,
    trajectories,
    trajectory_figure,
    undisturbed,
)
from sglight.callbacks.pictures import save_figure
from sglight.strategies.dni import DNI
from tests.callbacks.common import NETWORK, data, fit
from tests.strategies.common import assert_equal


@pytest.mark.parametrize("channels", [2, 4])
def test_both_figures_are_written_as_whole_pictures(tmp_path: Path, channels: int) -> None:
    fit([PlanarFigures(tmp_path / "figures")], tmp_path, channels=channels, opening="pad")
    files = sorted((tmp_path / "figures").iterdir())
    assert [file.name for file in files] == ["decision.png", "trajectories.png"]
    for file in files:
        pixels = imread(file)
        assert min(pixels.shape[:2]) > 500
        assert pixels[..., :3].std() > 0.05  # not a blank page


def test_tensorboard_has_both_figures_once_a_drawing(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    fit([PlanarFigures(tmp_path / "figures", every_n_epochs=2)], tmp_path, epochs=4, logger=logger)
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag in ("figures/decision", "figures/trajectories"):
        assert [event.step for event in events.Images(tag)] == [6, 12]


def test_an_exploded_network_is_drawn_as_far_as_it_is_finite(tmp_path: Path) -> None:
    module = DNI({**NETWORK, "dynamics": "euler", "activation": "relu"}, {"name": "adam", "lr": 1e-2})
    module.configure_model()
    planar = data()
    planar.setup("fit")
    for scale in (1e12, float("inf")):
        with undisturbed(module):
            for parameter in module.parameters():
                parameter.mul_(scale)
            for figure in (decision_figure(module, planar, 1, 50), trajectory_figure(module, planar, 1, 50)):
                save_figure(figure, tmp_path / "figure.png")


def test_drawing_does_not_change_the_training(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [PlanarFigures(tmp_path, every_n_epochs=1)]):
        torch.manual_seed(0)
        states.append(fit(callbacks, tmp_path, normalisation="batch").lightning_module.state_dict())
        states[-1]["random"] = torch.get_rng_state()
    assert_equal(*states)


def test_modes_are_restored_part_by_part() -> None:
    module = DNI(NETWORK, {"name": "adam", "lr": 1e-2})
    module.configure_model()
    module.train()
    module.stage(0).eval()
    with undisturbed(module):
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
    assert module.stage(1).training
    assert not module.stage(0).training


def test_trajectories_end_where_the_network_does() -> None:
    module = DNI(NETWORK, {"name": "adam", "lr": 1e-2}).eval()
    module.configure_model()
    planar = data()
    planar.setup("fit")
    x, _ = planar.points("val")
    times, states = trajectories(module, x)
    assert times.tolist() == pytest.approx([0, 0.5, 1.0, 1.5, 2.0])
    assert states.shape == (5, 60, 4)
    classifier = module.stage(1).classifier
    assert classifier is not None
    torch.testing.assert_close(classifier(states[-1].float()), module(x))


def test_projection_keeps_the_plane_and_finds_the_widest_one() -> None:
    plane = torch.randn(3, 10, 2, dtype=torch.float64)
    assert torch.equal(project(plane)[0], plane)
    wide = torch.zeros(3, 10, 5, dtype=torch.float64)
    wide[..., 3], wide[..., 1] = 5 * plane[..., 0], plane[..., 1]
    found, names = project(wide)
    centred = wide.flatten(0, 1) - wide.flatten(0, 1).mean(0)
    torch.testing.assert_close(found.square().sum(), centred.square().sum())
    assert "first principal component" in names[0]


def test_points_are_thinned_evenly() -> None:
    assert spread(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert spread(101, 3).tolist() == [0, 50, 100]
