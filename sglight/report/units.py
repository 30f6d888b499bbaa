"""A mean and its deviation as a short text with a unit."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10

Scale = Sequence[tuple[float, str]]
SECONDS: Scale = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTES: Scale = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))
COUNTS: Scale = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))


def percent(mean: float, std: float | None = None) -> str:
    """0.975 as ``97.50 %``."""
    return _join(100 * mean, None if std is None else 100 * std, 2, "%")


def ratio(mean: float, std: float | None = None) -> str:
    """1.86 as ``1.86×``."""
    return _join(mean, std, 2, "×").replace(" ×", "×")


def seconds(mean: float, std: float | None = None) -> str:
    """0.0123 as ``12.3 ms``, 240 as ``4 min``."""
    return _scaled(mean, std, SECONDS)


def size(mean: float, std: float | None = None) -> str:
    """Bytes: 934862848 as ``935 MB``."""
    return _scaled(mean, std, BYTES)


def count(mean: float, std: float | None = None) -> str:
    """38090 as ``38.1 k``; without a deviation if all are equal."""
    return _scaled(mean, std or None, COUNTS)


def plain(mean: float, std: float | None = None) -> str:
    """Any number, with three digits."""
    if std is None or not mean:
        return f"{mean:.3g}" if std is None else f"{mean:.3g} ± {std:.2g}"
    digits = min(max(2 - floor(log10(abs(mean))), 0), 9)
    if not 1e-4 <= abs(mean) < 1e6:
        return f"{mean:.2e} ± {std:.1e}"
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def _scaled(mean: float, std: float | None, scale: Scale) -> str:
    """In the largest unit of which there is at least one (of minutes and more: two), with three digits."""
    least = {"min": 2, "h": 2, "d": 2}
    factor, unit = next(
        (each for each in scale if abs(mean) >= each[0] * least.get(each[1], 0.9995)), scale[-1]
    )
    value = mean / factor
    digits = (
        0
        if not value or (factor == 1 and unit in ("", "B"))
        else max(2 - floor(log10(abs(value) * 1.0005)), 0)
    )
    if unit == "" and value != int(value):
        digits = 1
    return _join(value, None if std is None else std / factor, digits, unit)


def _join(mean: float, std: float | None, digits: int, unit: str) -> str:
    spread = "" if std is None else f" ± {std:.{digits}f}"
    return f"{mean:.{digits}f}{spread} {unit}".strip()
