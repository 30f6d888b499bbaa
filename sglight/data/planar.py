"""Generated point clouds in the plane: concentric ellipses, interleaved spirals, the levels of `peaks`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sglight.config.datasets import CLOUD_CLASSES, MOST_NOISE, MOST_POINTS, at_least, at_most
from sglight.data.module import Contents, DataModule, Part
from sglight.errors import UserError

Points = np.ndarray[Any, np.dtype[np.float64]]
Draw = Callable[[np.random.Generator, int, int], Points]


def ellipse(generator: np.random.Generator, label: int, count: int) -> Points:
    """Two concentric ellipses with semi-axes in the ratio 2 : 1.

    x = r (2 cos t, sin t), t uniform on [0, 2 pi), r^2 uniform (so that the points are uniform in area) on
    [0, 0.5^2] for class 0, the inner disc, and on [0.75^2, 1] for class 1, the ring around it.
    After Haber & Ruthotto 2017, section 6.1, who state no formula; the radii are ours.
    """
    inner, outer = ((0.0, 0.5), (0.75, 1.0))[label]
    radius = np.sqrt(generator.uniform(inner**2, outer**2, count))
    angle = generator.uniform(0, 2 * np.pi, count)
    return np.stack([2 * radius * np.cos(angle), radius * np.sin(angle)], 1)


def swiss_roll(generator: np.random.Generator, label: int, count: int) -> Points:
    """Two interleaved spirals of two turns each.

    x = (u + k / 5) (cos 4 pi u, sin 4 pi u), u uniform on [0, 1], k = 0, 1 the class.
    After Haber & Ruthotto 2017, section 6.2.
    """
    turn = generator.uniform(0, 1, count)
    radius, angle = turn + label / 5, 4 * np.pi * turn
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def peaks_height(x: Points) -> Points:
    """MATLAB's function `peaks` at points x = (a, b): [..., 2] in, [...] out.

    3 (1-a)^2 e^(-a^2 - (b+1)^2) - 10 (a/5 - a^3 - b^5) e^(-a^2 - b^2) - 1/3 e^(-(a+1)^2 - b^2)
    """
    a, b = x[..., 0], x[..., 1]
    hill = 3 * (1 - a) ** 2 * np.exp(-(a**2) - (b + 1) ** 2)
    saddle = 10 * (a / 5 - a**3 - b**5) * np.exp(-(a**2) - b**2)
    return hill - saddle - np.exp(-((a + 1) ** 2) - b**2) / 3


PEAKS_RANGE = (-6.5511333, 8.1062136)  # minimum and maximum of `peaks` on [-3, 3]^2


def peaks(generator: np.random.Generator, label: int, count: int) -> Points:
    """Five classes on [-3, 3]^2: class k has the points at which `peaks` is in the k-th fifth of its range.

    After Haber & Ruthotto 2017, section 6.3.
    """
    low, high = PEAKS_RANGE
    points = np.empty((0, 2))
    while len(points) < count:
        x = generator.uniform(-3, 3, (4096, 2))
        level = np.clip(5 * (peaks_height(x) - low) / (high - low), 0, 4.999).astype(int)
        points = np.concatenate([points, x[level == label]])
    return points[:count]


CLOUDS: dict[str, tuple[Draw, list[str]]] = {
    "ellipse": (ellipse, ["inner", "outer"]),
    "swiss_roll": (swiss_roll, ["first", "second"]),
    "peaks": (peaks, ["deep", "low", "middle", "high", "top"]),
}


def cloud(
    name: str, points: int, noise: float, seed: np.random.SeedSequence
) -> tuple[Points, np.ndarray[Any, Any]]:
    """Draws N = `points` points of the cloud `name`, as many of each class: x float64 [N, 2], y int64 [N]."""
    draw, classes = CLOUDS[name]
    generator = np.random.default_rng(seed)
    counts = [(points + len(classes) - 1 - label) // len(classes) for label in range(len(classes))]
    x = np.concatenate([draw(generator, label, count) for label, count in enumerate(counts)])
    y = np.repeat(np.arange(len(classes)), counts)
    return x + noise * generator.standard_normal(x.shape), y


class PlanarData(DataModule):
    """A generated point cloud. Training, validation and test points come from separate random streams of one seed.

    The points are not normalised, so that figures can be drawn in the coordinates of the network.
    """

    def __init__(
        self,
        name: str = "ellipse",
        train_points: int = 1000,
        val_points: int = 500,
        test_points: int = 500,
        noise: float = 0.0,
        batch_size: int = 64,
        eval_batch_size: int = 1000,
        seed: int = 1,
        data_seed: int = 0,
    ) -> None:
        super().__init__(name, batch_size, eval_batch_size, seed, data_seed)
        if name not in CLOUDS:
            raise UserError(f"dataset.name={name} is not a point cloud: choose one of {', '.join(CLOUDS)}")
        self.counts = {"train": train_points, "val": val_points, "test": test_points}
        for split, count in self.counts.items():
            at_least(f"dataset.{split}_points", count, CLOUD_CLASSES[name])
            at_most(f"dataset.{split}_points", count, MOST_POINTS)
        at_least("dataset.noise", noise, 0)
        at_most("dataset.noise", noise, MOST_NOISE)
        self.noise = noise

    def points(self, split: str) -> tuple[Tensor, Tensor]:
        """The points of "train", "val" or "test" for figures: x float32 [N, 2], y int64 [N], on the CPU."""
        part = self.contents().parts[split]
        return torch.from_numpy(part.x[:]).clone(), torch.from_numpy(part.y).clone()

    def open(self) -> Contents:
        """Draws the points."""
        streams = np.random.SeedSequence(self.data_seed).spawn(len(self.counts))
        parts = {}
        for (split, count), stream in zip(self.counts.items(), streams, strict=True):
            x, y = cloud(self.name, count, self.noise, stream)
            parts[split] = Part(x.astype(np.float32), np.arange(count), y)
        return Contents(parts, CLOUDS[self.name][1], mean=[0.0, 0.0], std=[1.0, 1.0])
