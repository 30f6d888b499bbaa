"""Numbers as texts."""

import pytest

from sglight.report import units


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
        (units.size, 12, None, "12 B"),
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
