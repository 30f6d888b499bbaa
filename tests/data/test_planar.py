"""The point clouds: where their points lie, equal shares, separate streams."""

import numpy as np
import pytest
import torch

from sglight.config.datasets import CLOUD_CLASSES
from sglight.data.planar import CLOUDS, PEAKS_RANGE, PlanarData, cloud, peaks_height
from sglight.errors import UserError


@pytest.mark.parametrize("name", CLOUDS)
def test_equal_shares_and_separate_draws(name):
    data = PlanarData(name, train_points=103, val_points=50, test_points=50)
    data.setup()
    (train, y), (val, _), (test, _) = (data.points(split) for split in ("train", "val", "test"))
    counts = torch.bincount(y)
    assert train.shape == (103, 2)
    assert train.dtype == torch.float32
    assert len(counts) == data.classes
    assert counts.max() - counts.min() <= 1
    points = [tuple(point) for part in (train, val, test) for point in part.tolist()]
    assert len(set(points)) == 203


@pytest.mark.parametrize("name", CLOUDS)
def test_the_same_seed_draws_the_same_points(name):
    same = [PlanarData(name, data_seed=seed).points("val")[0] for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_ellipse_is_a_disc_in_a_ring():
    x, y = cloud("ellipse", 4000, 0.0, np.random.SeedSequence(0))
    radius = np.hypot(x[:, 0] / 2, x[:, 1])
    assert radius[y == 0].max() <= 0.5
    assert radius[y == 1].min() >= 0.75
    assert radius[y == 1].max() <= 1
    # uniform in area: a quarter of the disc's points within half of its radius
    assert abs(np.mean(radius[y == 0] < 0.25) - 0.25) < 0.04


def test_swiss_roll_lies_on_two_spirals():
    x, y = cloud("swiss_roll", 1000, 0.0, np.random.SeedSequence(0))
    radius = np.hypot(*x.T)
    turn = radius - y / 5
    assert turn.min() >= -1e-12
    assert turn.max() <= 1
    np.testing.assert_allclose(x[:, 0], radius * np.cos(4 * np.pi * turn), atol=1e-9)


def test_peaks_are_the_fifths_of_its_range():
    x, y = cloud("peaks", 1000, 0.0, np.random.SeedSequence(0))
    assert abs(x).max() <= 3
    edges = np.linspace(*PEAKS_RANGE, 6)
    assert np.array_equal(np.digitize(peaks_height(x), edges[1:-1]), y)


def test_the_range_of_peaks():
    axis = np.linspace(-3, 3, 1201)
    heights = peaks_height(np.stack(np.meshgrid(axis, axis), -1))
    np.testing.assert_allclose((heights.min(), heights.max()), PEAKS_RANGE, atol=2e-4)
    assert peaks_height(np.zeros(2)) == pytest.approx(3 * np.exp(-1) - np.exp(-1) / 3)


def test_the_classes_of_the_schema_are_those_of_the_clouds():
    assert {name: len(classes) for name, (_, classes) in CLOUDS.items()} == CLOUD_CLASSES


def test_noise_moves_the_points():
    still, _ = cloud("ellipse", 5000, 0.0, np.random.SeedSequence(0))
    moved, _ = cloud("ellipse", 5000, 0.3, np.random.SeedSequence(0))
    assert abs((moved - still).std() - 0.3) < 0.01


def test_batches_are_the_points_as_they_are():
    data = PlanarData("ellipse", train_points=100, batch_size=32)
    data.setup("fit")
    served = torch.cat([x for x, _ in data.train_dataloader()])
    assert sorted(served.tolist()) == sorted(data.points("train")[0].tolist())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "elipse"}, "dataset.name=elipse"),
        ({"val_points": 1}, "dataset.val_points=1"),
        ({"name": "peaks", "train_points": 4}, "dataset.train_points=4"),
        ({"train_points": 10**12}, "dataset.train_points=1000000000000 is too large"),
        ({"noise": -0.1}, "dataset.noise=-0.1"),
        ({"noise": float("inf")}, "dataset.noise=inf"),
        ({"noise": float("nan")}, "dataset.noise=nan"),
    ],
)
def test_wrong_keys(keys, message):
    with pytest.raises(UserError, match=message):
        PlanarData(**keys)
