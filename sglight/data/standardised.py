"""Standardised numbers, computed in double precision before they are rounded to single precision."""

from typing import Any

import numpy as np

from sglight.data.loader import Array
from sglight.errors import UserError


class Standardised:
    """The rows of an array as (x - mean) / std in float32, computed in float64.

    If x were rounded to float32 first, seconds since 1970 would be multiples of 128, and numbers above 3e38 infinite.

    Args:
        array: [n, F] or [n, C, H, W] of any number type.
        mean, std: of each feature or channel; a std of 0 is replaced by 1.
        name: of the array, for messages.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, array: Array, mean: list[float], std: list[float], name: str = "the samples") -> None:
        self.array, self.name = array, name
        self.shape = tuple(array.shape)
        spread = (-1, *[1] * (len(self.shape) - 2))
        self.mean = np.reshape(np.asarray(mean, np.float64), spread)
        self.scale = np.reshape([value if value > 0 else 1.0 for value in std], spread)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray[Any, np.dtype[np.float32]]:
        values = (self.array[rows].astype(np.float64) - self.mean) / self.scale
        with np.errstate(over="ignore"):
            result: np.ndarray[Any, np.dtype[np.float32]] = values.astype(np.float32)
        if not np.isfinite(result).all():
            row = rows.start + int((~np.isfinite(result.reshape(len(result), -1))).any(1).argmax())
            raise UserError(
                f"{self.name}: row {row} is not finite, or too far from the training samples for single precision: "
                "scale the numbers, or leave the row out"
            )
        return result
