"""Line charts as geometry, which the page draws as SVG: scales, ticks, paths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np

# The viewBox: small enough for letters to be read on a phone, where a chart is about as wide.
WIDTH, HEIGHT = 420, 270
RIGHT, TOP, BOTTOM = 18, 12, 44
# Of the axes' texts: about how wide a letter is and how high, and the room that the vertical axis's title takes.
LETTER, LETTER_HEIGHT, TITLE_ROOM = 7.0, 13.0, 32
COLOURS, DASHES = 7, 4
TICKS = 5  # about so many on an axis
LEAST_PART = 2e-3  # of the values themselves: an axis reaches at least so far beyond them
DOTS = 40  # a line with more points has none marked

Tick = tuple[float, str]


@dataclass(frozen=True)
class Line:
    """What is drawn of one group.

    Attributes:
        group: its number, for the legend's switches.
        style: its colour and dash, as classes.
        label: its name.
        xs, ys: the points ``[N]``.
        spread: half the height of the band ``[N]``, None without.
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
        factor: numbers on it are values times this.
        limits: its ends; None: those of the values, with some room.
        whole: whether only whole numbers are marked.
    """

    label: str
    log: bool = False
    factor: float = 1.0
    limits: tuple[float, float] | None = None
    whole: bool = False


@dataclass(frozen=True)
class Mark:
    """A line as SVG: its path, its band, its points (none if they are many) with their values as texts."""

    group: int
    style: str
    label: str
    path: str
    band: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """All that is needed to draw a chart; positions are in units of the viewBox."""

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
    """The chart of these lines; points that are no numbers, or not positive on a logarithmic scale, are left out.

    None if nothing is left.
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
    """The ticks whose texts do not run into that of the one kept before; ``size`` of a text along the axis."""
    kept: list[Tick] = []
    for at, text in ticks:
        if not kept or abs(at - kept[-1][0]) >= (size(text) + size(kept[-1][1])) / 2:
            kept.append((at, text))
    return kept


def ticks(ends: tuple[float, float], axis: Axis) -> list[Tick]:
    """Round numbers between the ends of an axis, and how they are written."""
    low, high = (end * axis.factor for end in ends)
    if axis.log and high / low >= 10:
        decades = range(ceil(log10(low) - 1e-9), floor(log10(high) + 1e-9) + 1)
        values = [10.0**k for k in decades][:: max(1, ceil(len(decades) / (TICKS + 1)))]
        if len(values) < 3:
            values = [m * 10.0**k for k in range(floor(log10(low)), ceil(log10(high)) + 1) for m in (1, 2, 5)]
        return [(v / axis.factor, _text(v, v)) for v in values if low * (1 - 1e-9) <= v <= high * (1 + 1e-9)]
    step = _round_step((high - low) / (TICKS + 1), axis.whole)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [(k * step / axis.factor, _text(k * step, step)) for k in range(first, last + 1)]


def _round_step(step: float, whole: bool) -> float:
    """The next of ..., 0.1, 0.2, 0.5, 1, 2, 5, ... from ``step`` up."""
    power = 10.0 ** floor(log10(step))
    found = next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))
    return max(found, 1.0) if whole else found


def _text(value: float, step: float) -> str:
    """A number with as many digits as the step between numbers asks for; thousands as k."""
    if abs(value) >= 10_000 or (abs(value) >= 1000 and step >= 1000):
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.{max(0, -floor(log10(step) + 1e-9))}f}" if value else "0"


def _drawable(line: Line, x: Axis, y: Axis) -> Line:
    keep = np.isfinite(line.xs) & np.isfinite(line.ys)
    keep &= (line.xs > 0) | (not x.log)
    keep &= (line.ys > 0) | (not y.log)
    spread = None if line.spread is None else line.spread[keep]
    return Line(line.group, line.style, line.label, line.xs[keep], line.ys[keep], spread)


def _reach(line: Line, log: bool) -> np.ndarray:
    """The values of a line, with its band if the scale has no end at zero."""
    if line.spread is None or log:
        return line.ys
    return np.concatenate([line.ys - line.spread, line.ys + line.spread])


def _ends(values: np.ndarray, log: bool, room: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if log:
        factor = max((high / low) ** room, 1.1)
        return low / factor, high * factor
    # Less than what a short number can tell is drawn as what it is: no difference.
    margin = max((high - low or abs(high)) * room, LEAST_PART * abs(high)) or 1.0
    return low - margin, high + margin


def _scale(
    ends: tuple[float, float], log: bool, first: float, last: float
) -> Callable[[np.ndarray | float], np.ndarray]:
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
