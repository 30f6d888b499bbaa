"""Numbers as texts with units."""

import pytest

from sglight import units


@pytest.mark.parametrize(
    ("show", "mean", "std", "text"),
    [
        (units.percent, 0.975, None, "97.50 %"),
        (units.percent, 0.975, 0.0031, "97.50 ± 0.31 %"),
        (units.ratio, 1.864, None, "1.86×"),
        (units.ratio, 1.864, 0.05, "1.86 ± 0.05×"),
        (units.seconds, 0.0123, 0.0004, "12.3 ± 0.4 ms"),
        (units.seconds, 0.9996, None, "1.00 s"),
        (units.seconds, 119.0, None, "119 s"),
        (units.seconds, 121.0, 6.0, "2.02 ± 0.10 min"),
        (units.seconds, 3 * 3600.0, None, "3.00 h"),
        (units.seconds, 0.0, None, "0 µs"),
        (units.size, 934_862_848, None, "935 MB"),
        (units.seconds, 5e5, None, "5.79 d"),
        (units.size, 12, None, "12 B"),
        (units.size, 2.5e15, None, "2.50 PB"),
        (units.count, 38090, 0.0, "38.1 k"),
        (units.count, 7, None, "7"),
        (units.count, 6770.4, 12.0, "6.77 ± 0.01 k"),
        (units.plain, 0.0, None, "0"),
        (units.plain, 126, None, "126"),
        (units.plain, 0.63502, 0.01, "0.635 ± 0.010"),
        (units.plain, 1.25e-6, 1e-7, "1.25e-06 ± 1.0e-07"),
    ],
)  # fmt: skip
def test_texts(show, mean, std, text):
    assert show(mean, std) == text


@pytest.mark.parametrize(("part", "text"), [(0, "0 %"), (0.453, "45 %"), (1, "100 %")])
def test_shares(part, text):
    assert units.share(part) == text


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(0, 0.2, "0"), (0.4, 0.2, "0.4"), (1.0, 0.2, "1.0"), (1500, 500, "1500"), (2000, 1000, "2k"), (3e6, 1e6, "3M"),
     (1e-5, 1e-5, "1e-5")],
)  # fmt: skip
def test_numbers_at_axes(value, step, text):
    assert units.tick(value, step) == text


def test_plurals():
    assert [units.plural(n, "batch", "batches") for n in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]
