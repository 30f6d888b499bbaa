"""Where scikit-learn keeps its handwritten digits."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Values = np.ndarray[Any, Any]
DIGITS = "datasets/data/digits.csv.gz"  # below the package


def digits() -> tuple[Values, Values]:
    """The pictures ``[1797, 8, 8]`` with levels 0 ... 16, and their labels, of `sklearn.datasets.load_digits`.

    They are read from its file, because scikit-learn takes a second to import.
    """
    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / DIGITS
    if not file.is_file():  # another version may keep it elsewhere
        from sklearn.datasets import load_digits

        found = load_digits()
        return found.images.astype(np.uint8), found.target.astype(np.int64)
    text = gzip.decompress(file.read_bytes()).decode()
    rows = np.array([line.split(",") for line in text.split()], np.float64)
    return rows[:, :-1].reshape(-1, 8, 8).astype(np.uint8), rows[:, -1].astype(np.int64)
