"""Mean and standard deviation of samples that need not fit into memory."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SLAB_BYTES = 16 << 20
ROUNDING = 16 * np.finfo(np.float64).eps
Values = np.ndarray[Any, Any]


def slabs(shape: Sequence[int], itemsize: int) -> Iterator[slice]:
    """Divides the first axis of an array into slices of about 16 MiB.

    >>> list(slabs((10, 4 << 20), itemsize=1))
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    rows = max(1, SLAB_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    return (slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))


def statistics(x: Any, rows: Values | None = None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of pictures [N, C, H, W] or each feature of vectors [N, F].

    Bytes are divided by 255; their result does not depend on the order of the samples. x is read once.

    Args:
        x: an array, in memory or in a file.
        rows: the samples to use, ascending; None: all.
    """
    pieces = (_rows(x, slab, rows) for slab in slabs(x.shape, x.dtype.itemsize))
    if x.dtype == np.uint8 and len(x.shape) == 4:
        return _of_pixels(pieces, x.shape[1])
    mean, std = _of_numbers(pieces, x.shape[1])
    std = np.where(std <= ROUNDING * abs(mean), 0.0, std)  # a constant, up to rounding errors
    unit = 255 if x.dtype == np.uint8 else 1
    return (mean / unit).tolist(), (std / unit).tolist()


def _rows(x: Any, slab: slice, rows: Values | None) -> Values:
    values: Values = x[slab]
    if rows is None:
        return values
    first, last = np.searchsorted(rows, (slab.start, slab.stop))
    return values[rows[first:last] - slab.start]


def _of_pixels(pieces: Iterator[Values], channels: int) -> tuple[list[float], list[float]]:
    counts = np.zeros((channels, 256), np.int64)
    for piece in pieces:
        for channel in range(channels):
            counts[channel] += np.bincount(piece[:, channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    return mean.tolist(), np.sqrt(variance).tolist()


def _of_numbers(pieces: Iterator[Values], channels: int) -> tuple[Values, Values]:
    """Combines count, mean and squared deviations of each piece (Chan, Golub & LeVeque 1983)."""
    count, mean, squares = 0, np.zeros(channels), np.zeros(channels)
    for piece in pieces:
        values = np.moveaxis(piece.astype(np.float64), 1, 0).reshape(channels, -1)
        if not values.size:
            continue
        added, centre = values.shape[1], values.mean(1)
        change, total = centre - mean, count + added
        squares += ((values - centre[:, None]) ** 2).sum(1) + change**2 * (count * added / total)
        mean += change * (added / total)
        count = total
    return mean, np.sqrt(squares / max(1, count))
