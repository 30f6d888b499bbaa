"""Statistics in pieces are those of the whole."""

import numpy as np
import pytest

from sglight.data import statistics as module
from sglight.data.statistics import slabs, statistics


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch):
    monkeypatch.setattr(module, "SLAB_BYTES", 1000)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int16])
@pytest.mark.parametrize("shape", [(300, 3, 4, 5), (300, 7)])
def test_against_numpy(dtype, shape):
    x = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    rows = np.arange(0, 300, 3)
    unit = 255 if dtype == np.uint8 else 1
    for chosen in (None, rows):
        values = (x if chosen is None else x[chosen]).astype(np.float64) / unit
        axes = (0, 2, 3) if len(shape) == 4 else (0,)
        mean, std = statistics(x, chosen)
        np.testing.assert_allclose(mean, values.mean(axes), rtol=1e-10)
        np.testing.assert_allclose(std, values.std(axes), rtol=1e-10)


def test_slabs_cover_all_rows():
    pieces = list(slabs((25, 300), 1))
    assert [row for piece in pieces for row in range(piece.start, piece.stop)] == list(range(25))
    assert all(piece.stop - piece.start <= 3 for piece in pieces)
    assert list(slabs((2, 10_000), 4)) == [slice(0, 1), slice(1, 2)]


def test_a_constant_has_no_deviation():
    assert statistics(np.full((1000, 3), 14.62))[1] == [0.0] * 3
    assert statistics(np.arange(1000.0)[:, None] * 1e-6 + 1.7e9)[1][0] == pytest.approx(2.89e-4, rel=1e-2)
