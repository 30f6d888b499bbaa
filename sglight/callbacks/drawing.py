"""Draws the figures of planar data from arrays, as matplotlib Figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sglight.callbacks.pictures import COLOURS, new_figure

Array = np.ndarray[Any, Any]

MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # classes can be told apart without colours
FULL_SHADE = 0.6  # how much colour a decision with probability 1 has; the rest is white
INK = "#333333"


def colour(label: int) -> str:
    """The colour of a class."""
    return COLOURS[label % len(COLOURS)]


def marker(label: int) -> str:
    """The marker of a class."""
    return MARKERS[label % len(MARKERS)]


@dataclass(frozen=True)
class Cloud:
    """Labelled points in the plane: x [N, 2], y [N], names of the K classes."""

    x: Array
    y: Array
    names: Sequence[str]


@dataclass(frozen=True)
class Regions:
    """Class probabilities [rows, columns, K] on a grid over ``extent`` (left, right, bottom, top)."""

    probabilities: Array
    extent: tuple[float, float, float, float]

    @staticmethod
    def around(x: Array, cells: int, margin: float = 0.08) -> tuple[Array, tuple[int, int], Any]:
        """A grid of square cells around points x [N, 2]: its points [rows * columns, 2], its shape and its extent.

        Args:
            x: the points to enclose.
            cells: along the longer side.
            margin: around the points, as a part of the longer side.
        """
        low, high = x.min(0), x.max(0)
        edge = max(margin * float((high - low).max()), 1e-6)
        low, high = low - edge, high + edge
        cell = float((high - low).max()) / cells
        columns, rows = (max(int(np.ceil(side / cell)), 2) for side in high - low)
        a = low[0] + cell * (np.arange(columns) + 0.5)
        b = low[1] + cell * (np.arange(rows) + 0.5)
        points = np.stack(np.meshgrid(a, b), -1).reshape(-1, 2)
        return points, (rows, columns), (low[0], low[0] + cell * columns, low[1], low[1] + cell * rows)


@dataclass(frozen=True)
class Paths:
    """Points at successive times.

    Attributes:
        positions: [T + 1, N, 2].
        times: [T + 1].
        y: the labels of the points [N].
        names: of the classes.
        axes: what the two coordinates are.
    """

    positions: Array
    times: Array
    y: Array
    names: Sequence[str]
    axes: tuple[str, str]


def draw_decision(cloud: Cloud, regions: Regions, predicted: Array, title: str) -> Figure:
    """The most probable class at each place of the plane, shaded by its probability, with the points over it."""
    left, right, bottom, top = regions.extent
    figure = new_figure(7.0, float(np.clip(5.4 * (top - bottom) / (right - left), 2.5, 8.0)) + 1.2, title)
    axes = figure.add_subplot()
    axes.imshow(
        _shade(regions.probabilities), extent=regions.extent, origin="lower", interpolation="bilinear"
    )
    _draw_borders(axes, regions)
    wrong = predicted != cloud.y
    _scatter(axes, cloud.x, cloud.y, len(cloud.names), size=_point_size(len(cloud.y)))
    axes.scatter(
        cloud.x[wrong, 0],
        cloud.x[wrong, 1],
        s=90,
        marker="o",
        facecolors="none",
        edgecolors="black",
        linewidths=1.3,
        zorder=4,
    )
    axes.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    handles = _legend_handles(cloud.names)
    if wrong.any():
        ring = Line2D(
            [], [], linestyle="", marker="o", markersize=9, markerfacecolor="none", markeredgecolor="black"
        )
        ring.set_label(f"wrong ({wrong.sum()} of {len(wrong)})")
        handles.append(ring)
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    _add_probability_bar(figure, axes, regions.probabilities.shape[-1])
    return figure


def draw_trajectories(paths: Paths, title: str, snapshots: int = 4) -> Figure:
    """The trajectories of points through the layers, and below them the points at a few times."""
    figure = new_figure(8.0, 8.2, title)
    grid = figure.add_gridspec(2, snapshots, height_ratios=(2.6, 1.0))
    main = figure.add_subplot(grid[0, :])
    _draw_paths(main, paths)
    for k, moment in enumerate(np.linspace(0, paths.times[-1], snapshots)):
        j = int(np.abs(paths.times - moment).argmin())
        axes = figure.add_subplot(grid[1, k])
        _scatter(axes, paths.positions[j], paths.y, len(paths.names), size=9)
        axes.set_title(f"$t$ = {paths.times[j]:.3g}", fontsize=10)
        axes.set_aspect("equal", adjustable="datalim")
        axes.tick_params(labelsize=7)
        axes.margins(0.1)
    figure.legend(handles=_legend_handles(paths.names), loc="outside right center", frameon=False)
    return figure


def _shade(probabilities: Array) -> Array:
    """RGB [rows, columns, 3]: the colour of the most probable class, fading to white where all are equally so."""
    classes = probabilities.shape[-1]
    palette = np.array([to_rgb(colour(k)) for k in range(classes)])
    certainty = (probabilities.max(-1, keepdims=True) - 1 / classes) / (1 - 1 / classes)
    return 1 - FULL_SHADE * certainty * (1 - palette[probabilities.argmax(-1)])


def _draw_borders(axes: Axes, regions: Regions) -> None:
    """Draws lines where the most probable class changes: where p_k equals the largest of the others."""
    rows, columns, classes = regions.probabilities.shape
    left, right, bottom, top = regions.extent
    a = left + (right - left) * (np.arange(columns) + 0.5) / columns
    b = bottom + (top - bottom) * (np.arange(rows) + 0.5) / rows
    for k in range(classes if classes > 2 else 1):
        others = np.delete(regions.probabilities, k, -1).max(-1)
        lead = regions.probabilities[..., k] - others
        if lead.min() < 0 < lead.max():
            axes.contour(a, b, lead, levels=[0.0], colors=INK, linewidths=1.2)


def _draw_paths(axes: Axes, paths: Paths) -> None:
    """Draws each trajectory as a line in the colour of its class, from a hollow to a filled marker."""
    ways = paths.positions.transpose(1, 0, 2)
    alpha = float(np.clip(30 / max(len(ways), 1), 0.15, 0.6))
    colours = [colour(label) for label in paths.y]
    axes.add_collection(LineCollection(list(ways), colors=colours, linewidths=0.7, alpha=alpha, zorder=1))
    for k in range(len(paths.names)):
        mine = paths.positions[:, paths.y == k]
        axes.scatter(
            mine[0, :, 0],
            mine[0, :, 1],
            s=16,
            marker=marker(k),
            facecolors="white",
            edgecolors=colour(k),
            linewidths=0.8,
            zorder=2,
        )
    _scatter(axes, paths.positions[-1], paths.y, len(paths.names), size=26)
    axes.set(xlabel=paths.axes[0], ylabel=paths.axes[1])
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.06)
    start = Line2D(
        [], [], linestyle="", marker="o", markerfacecolor="white", markeredgecolor=INK, label="start"
    )
    end = Line2D([], [], linestyle="", marker="o", markerfacecolor=INK, markeredgecolor="white", label="end")
    axes.legend(handles=[start, end], loc="best", fontsize=9)


def _scatter(axes: Axes, x: Array, y: Array, classes: int, size: float) -> None:
    for k in range(classes):
        axes.scatter(
            x[y == k, 0],
            x[y == k, 1],
            s=size,
            marker=marker(k),
            color=colour(k),
            edgecolors="white",
            linewidths=0.4,
            zorder=3,
        )


def _legend_handles(names: Sequence[str]) -> list[Line2D]:
    return [
        Line2D([], [], linestyle="", marker=marker(k), color=colour(k), markeredgecolor="white", label=name)
        for k, name in enumerate(names)
    ]


def _add_probability_bar(figure: Figure, axes: Axes, classes: int) -> None:
    """Adds a bar that explains the shades, in grey for all classes."""
    scale = LinearSegmentedColormap.from_list("certainty", ["white", to_hex((1 - FULL_SHADE,) * 3)])
    bar = figure.colorbar(ScalarMappable(Normalize(1 / classes, 1), scale), ax=axes, shrink=0.6, aspect=25)
    bar.set_label("probability of the class chosen")
    bar.outline.set_linewidth(0.4)


def _point_size(count: int) -> float:
    return float(np.clip(6000 / max(count, 1), 10, 36))
