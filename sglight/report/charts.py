"""Line charts as geometry: scales, ticks and paths, which the template of the page draws as SVG.

Of the libraries that draw charts in a page by themselves, plotly and bokeh need a script of megabytes, and matplotlib's
SVG has neither switches for its lines nor the fonts and colours of the page. Ticks are matplotlib's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sglight.units import tick

# The viewBox: so small that letters can be read on a phone, where a chart is about as wide.
WIDTH, HEIGHT = 420, 270
RIGHT, TOP, BOTTOM = 18, 12, 44  # margins
LETTER, LETTER_HEIGHT = 7.0, 13.0  # about the size of a letter at an axis
TITLE_ROOM = 32  # the width of the vertical axis's title
COLOURS, DASHES = 7, 4
TICKS = 5  # about so many on an axis
LEAST_MARGIN = 2e-3  # between the values and the ends of an axis, as a part of the values
DOTS = 40  # the points of lines with more of them are not marked

Tick = tuple[float, str]


@dataclass(frozen=True)
class Line:
    """The curve of one group.

    Attributes:
        group: the number of the group, by which the legend shows and hides it.
        style: its colour and dash, as CSS classes.
        label: its name.
        xs, ys: the points ``[N]``.
        spread: half the height of the band around them ``[N]``; None for no band.
    """

    group: int
    style: str
    label: str
    xs: np.ndarray
    ys: np.ndarray
    spread: np.ndarray | None = None


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, with its unit.
        log: whether its scale is logarithmic.
        factor: the numbers at it are the values times this.
        limits: its ends; None for those of the values, with a margin.
        whole: whether only whole numbers are marked.
    """

    label: str
    log: bool = False
    factor: float = 1.0
    limits: tuple[float, float] | None = None
    whole: bool = False


@dataclass(frozen=True)
class Mark:
    """A line as SVG: its path, its band, and its points (none if they are many) with their values as text."""

    group: int
    style: str
    label: str
    path: str
    band: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """Everything that is needed to draw a chart; positions are in units of the viewBox."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    marks: Sequence[Mark]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = TITLE_ROOM
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def draw(title: str, x: Axis, y: Axis, lines: Sequence[Line]) -> Chart | None:
    """The chart of some lines; None if there is nothing to draw.

    Points that are not finite, or not positive on a logarithmic axis, are left out.
    """
    lines = [line for line in (_drawable(line, x, y) for line in lines) if len(line.xs)]
    if not lines:
        return None
    x_ends = x.limits or _ends(np.concatenate([line.xs for line in lines]), x.log, room=0.04)
    y_ends = y.limits or _ends(np.concatenate([_reach(line, y.log) for line in lines]), y.log, room=0.06)
    to_y = _scale(y_ends, y.log, HEIGHT - BOTTOM, TOP)
    y_ticks = [(round(float(to_y(v)), 1), text) for v, text in ticks(y_ends, y)]
    y_ticks = _apart(y_ticks, lambda _: LETTER_HEIGHT)
    left = TITLE_ROOM + round(max((LETTER * len(text) for _, text in y_ticks), default=0.0))
    to_x = _scale(x_ends, x.log, left, WIDTH - RIGHT)
    x_ticks = [(round(float(to_x(v)), 1), text) for v, text in ticks(x_ends, x)]
    x_ticks = _apart(x_ticks, lambda text: LETTER * (len(text) + 1))
    least = y_ends[0] if y.log else -np.inf
    marks = [_mark(line, to_x, to_y, least, x.factor, y.factor) for line in lines]
    return Chart(title, x.label, y.label, x_ticks, y_ticks, marks, left=left)


def _apart(ticks: Sequence[Tick], size: Callable[[str], float]) -> list[Tick]:
    """Leaves out ticks whose texts would overlap; ``size`` gives the size of a text along the axis."""
    kept: list[Tick] = []
    for at, text in ticks:
        if not kept or abs(at - kept[-1][0]) >= (size(text) + size(kept[-1][1])) / 2:
            kept.append((at, text))
    return kept


def ticks(ends: tuple[float, float], axis: Axis) -> list[Tick]:
    """Round numbers between the ends of an axis: for each its value and its text."""
    from matplotlib.ticker import (  # tables need no matplotlib, which takes time to import
        LogLocator,
        MaxNLocator,
    )

    low, high = (end * axis.factor for end in ends)
    if axis.log and high / low >= 10:
        places = _between(LogLocator(numticks=TICKS + 2).tick_values(low, high), low, high)
        if len(places) < 3:
            places = _between(LogLocator(subs=(1, 2, 5)).tick_values(low, high), low, high)
        return [(place / axis.factor, tick(place, place)) for place in places]
    locator = MaxNLocator(TICKS + 1, steps=[1, 2, 5, 10], integer=axis.whole, min_n_ticks=1)
    found = locator.tick_values(low, high)
    step = float(found[1] - found[0])
    return [(place / axis.factor, tick(place, step)) for place in _between(found, low, high)]


def _between(places: Iterable[float], low: float, high: float) -> list[float]:
    """The ticks that lie between the ends of an axis."""
    low, high = low - 1e-9 * abs(low), high + 1e-9 * abs(high)
    return [float(place) for place in places if low <= place <= high]


def _drawable(line: Line, x: Axis, y: Axis) -> Line:
    """A line without the points that cannot be drawn."""
    keep = np.isfinite(line.xs) & np.isfinite(line.ys)
    keep &= (line.xs > 0) | (not x.log)
    keep &= (line.ys > 0) | (not y.log)
    spread = None if line.spread is None else line.spread[keep]
    return Line(line.group, line.style, line.label, line.xs[keep], line.ys[keep], spread)


def _reach(line: Line, log: bool) -> np.ndarray:
    """The values of a line that an axis must show: on a linear axis with its band."""
    if line.spread is None or log:
        return line.ys
    return np.concatenate([line.ys - line.spread, line.ys + line.spread])


def _ends(values: np.ndarray, log: bool, room: float) -> tuple[float, float]:
    """The ends of an axis for these values, with a margin of ``room`` times their range."""
    low, high = float(values.min()), float(values.max())
    if log:
        factor = max((high / low) ** room, 1.1)
        return low / factor, high * factor
    # So that differences below what the numbers at the axis can show look like none.
    margin = max((high - low or abs(high)) * room, LEAST_MARGIN * abs(high)) or 1.0
    return low - margin, high + margin


def _scale(
    ends: tuple[float, float], log: bool, first: float, last: float
) -> Callable[[np.ndarray | float], np.ndarray]:
    """The function that maps values to positions, with ``ends`` at ``first`` and ``last``."""
    low, high = np.log10(ends) if log else ends

    def position(value: np.ndarray | float) -> np.ndarray:
        part = ((np.log10(value) if log else np.asarray(value)) - low) / (high - low)
        return first + np.clip(part, -9, 9) * (last - first)

    return position


def _mark(
    line: Line,
    to_x: Callable[[np.ndarray | float], np.ndarray],
    to_y: Callable[[np.ndarray | float], np.ndarray],
    least: float,
    x_factor: float,
    y_factor: float,
) -> Mark:
    xs, ys = to_x(line.xs), to_y(line.ys)
    band = ""
    if line.spread is not None and line.spread.any():
        upper, lower = to_y(line.ys + line.spread), to_y(np.maximum(line.ys - line.spread, least))
        band = _path(np.concatenate([xs, xs[::-1]]), np.concatenate([upper, lower[::-1]])) + "Z"
    places = np.stack([xs, ys], 1).round(1).tolist() if len(xs) <= DOTS else []
    values = zip((line.xs * x_factor).tolist(), (line.ys * y_factor).tolist(), strict=True)
    points = [(a, b, f"{x:.4g}, {y:.4g}") for (a, b), (x, y) in zip(places, values, strict=False)]
    return Mark(line.group, line.style, line.label, _path(xs, ys), band, points)


def _path(xs: np.ndarray, ys: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(xs, ys, strict=True))
