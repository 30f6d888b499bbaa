"""Levels: defaults, lists, and the epochs with which they begin."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglight.config.levels import Course, Level, first_epochs, make_levels


def test_the_default_is_an_exact_start_and_late_gradients_behind_it() -> None:
    assert make_levels(3) == [Level("exact"), Level("delayed"), Level("delayed")]
    assert make_levels(1) == [Level("exact")]


def test_one_value_or_one_for_each() -> None:
    config = {"mode": "exact", "lr": [1e-2, 1e-3], "epochs": [None, 4], "estimator_lr": None}
    assert make_levels(2, config) == [Level("exact", None, 1e-2), Level("exact", 4, 1e-3)]


@given(claims=st.lists(st.none() | st.integers(1, 9), min_size=1, max_size=6), spare=st.integers(0, 20))
def test_epochs_add_up(claims: list[int | None], spare: int) -> None:
    some_open = None in claims
    total = sum(1 if c is None else c for c in claims) + (spare if some_open else 0)
    firsts = first_epochs([Level("exact", c) for c in claims], total)
    lengths = [b - a for a, b in zip(firsts, [*firsts[1:], total], strict=True)]
    assert firsts[0] == 0 and sum(lengths) == total and min(lengths) >= 1
    assert all(c in (None, n) for c, n in zip(claims, lengths, strict=True))
    shared = [n for c, n in zip(claims, lengths, strict=True) if c is None]
    assert len(set(shared[:-1])) <= 1 and all(0 <= shared[-1] - n < len(shared) for n in shared)


@pytest.mark.parametrize(("claims", "total"), [([4, 4], 9), ([4, 4], 7), ([4, None], 4), ([None] * 3, 2)])
def test_epochs_that_do_not_add_up(claims: list[int | None], total: int) -> None:
    with pytest.raises(
        ValueError, match=rf"trainer\.max_epochs={total} is not the sum .* set trainer\.max_epochs="
    ):
        first_epochs([Level("exact", c) for c in claims], total)


@given(claims=st.lists(st.none() | st.integers(1, 9), min_size=2, max_size=6), data=st.data())
def test_levels_that_are_left_are_shared_out_as_all_are(
    claims: list[int | None], data: st.DataObject
) -> None:
    levels, level = [Level("exact", c) for c in claims], data.draw(st.integers(0, len(claims) - 1))
    epoch, total = data.draw(st.integers(0, 9)), sum(c or 2 for c in claims)
    firsts = Course(level, epoch).firsts(levels, epoch + sum(c or 2 for c in claims[level:]))
    assert firsts == [
        epoch + first for first in first_epochs(levels[level:], sum(c or 2 for c in claims[level:]))
    ]
    # With epochs to spare the last level has what no other one takes.
    spared = Course(level, 0, strict=False).firsts(levels, total + 5)
    claimed = [c for c in claims[level:-1] if c is not None]
    if len(claimed) == len(claims[level:-1]):
        assert spared[-1] == sum(claimed)


def test_epochs_before_are_told_of() -> None:
    message = (
        r"max_epochs=7 is not the sum of strategy\.level\.epochs=\[2\] after the 4 epochs .*max_epochs=6,"
    )
    with pytest.raises(ValueError, match=message):
        Course(1, 4).firsts([Level("exact", 3), Level("dni", 2)], 7)


@pytest.mark.parametrize(
    ("count", "config", "message"),
    [
        (0, {}, r"strategy\.levels=0 must be at least 1"),
        (2, {"mode": "both"}, r"strategy\.level\.mode=both is unknown; choose one of exact, delayed, dni"),
        (2, {"lr": [0.1]}, r"strategy\.level\.lr=\[0\.1\] has 1 entries, but strategy\.levels=2"),
        (2, {"lr": math.nan}, r"strategy\.level\.lr=nan is not allowed"),
        (2, {"lr": [1e-3, math.inf]}, r"strategy\.level\.lr=inf is not allowed"),
        (2, {"lr": -1}, r"strategy\.level\.lr=-1 is not allowed; it must be a positive number"),
        (2, {"epochs": [2, 2.5]}, r"strategy\.level\.epochs=2\.5 .* positive whole number"),
        (2, {"epochs": 0}, r"strategy\.level\.epochs=0 .* positive whole number"),
        (2, {"estimator_lr": "fast"}, r"strategy\.level\.estimator_lr=fast is not allowed"),
    ],
)
def test_what_is_refused(count: int, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_levels(count, config)
