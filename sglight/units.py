"""Numbers as short texts with a unit, one way for terminal, report and figures; imports nothing of ours.

Each function takes a number and, if it is a mean, its standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10

Scale = Sequence[tuple[float, str]]
SECONDS: Scale = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs"))
BYTES: Scale = (
    (1e18, "EB"), (1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"),
)  # fmt: skip
COUNTS: Scale = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
LEAST = {"min": 2, "h": 2, "d": 2}  # so many of these units, or the next smaller one is used


def percent(mean: float, std: float | None = None) -> str:
    """A part of one in percent, with two digits.

    >>> percent(0.975), percent(0.975, 0.0031)
    ('97.50 %', '97.50 ± 0.31 %')
    """
    return _join(100 * mean, None if std is None else 100 * std, 2, "%")


def share(part: float) -> str:
    """A part of one in whole percent.

    >>> share(0.453)
    '45 %'
    """
    return _join(100 * part, None, 0, "%")


def ratio(mean: float, std: float | None = None) -> str:
    """A factor, such as a speed-up.

    >>> ratio(1.864)
    '1.86×'
    """
    return _join(mean, std, 2, "×").replace(" ×", "×")


def seconds(mean: float, std: float | None = None) -> str:
    """A time in seconds, in the unit that suits it.

    >>> seconds(0.0123), seconds(119), seconds(240)
    ('12.3 ms', '119 s', '4.00 min')
    """
    return _scaled(mean, std, SECONDS)


def size(mean: float, std: float | None = None) -> str:
    """A number of bytes.

    >>> size(934_862_848)
    '935 MB'
    """
    return _scaled(mean, std, BYTES)


def count(mean: float, std: float | None = None) -> str:
    """A number of things; a deviation of 0 is left out.

    >>> count(7), count(38090), count(6770.4, 12.0)
    ('7', '38.1 k', '6.77 ± 0.01 k')
    """
    return _scaled(mean, std or None, COUNTS)


def plain(mean: float, std: float | None = None) -> str:
    """A number without a unit, with three digits.

    >>> plain(0.63502, 0.01), plain(1.25e-6, 1e-7)
    ('0.635 ± 0.010', '1.25e-06 ± 1.0e-07')
    """
    if std is None or not mean:
        return f"{mean:.3g}" if std is None else f"{mean:.3g} ± {std:.2g}"
    digits = min(max(2 - floor(log10(abs(mean))), 0), 9)
    if not 1e-4 <= abs(mean) < 1e6:
        return f"{mean:.2e} ± {std:.1e}"
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def short(value: float) -> str:
    """A number of any size, with at most three digits.

    >>> short(0.0123), short(4), short(2540), short(1.2e6)
    ('0.0123', '4', '2.54 k', '1.2 M')
    """
    for factor, letter in ((1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def tick(value: float, step: float) -> str:
    """A number at an axis, with as many digits as the step between numbers needs.

    >>> tick(0.4, 0.2), tick(12000, 2000), tick(1e-5, 1e-5)
    ('0.4', '12k', '1e-5')
    """
    if abs(value) >= 10_000 or (abs(value) >= 1000 and step >= 1000):
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.{max(0, -floor(log10(step) + 1e-9))}f}" if value else "0"


def plural(number: int, noun: str, several: str = "") -> str:
    """A number with its noun.

    >>> plural(1, "epoch"), plural(3, "epoch"), plural(2, "batch", "batches")
    ('1 epoch', '3 epochs', '2 batches')
    """
    return f"{number} {noun if number == 1 else several or f'{noun}s'}"


def _scaled(mean: float, std: float | None, scale: Scale) -> str:
    """Three digits, in the largest unit of which there are `LEAST` or at least one."""
    factor, unit = next(
        (each for each in scale if abs(mean) >= each[0] * LEAST.get(each[1], 0.9995)), scale[-1]
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
