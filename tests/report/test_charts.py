"""Where charts put their points, and which numbers stand at their axes."""

import re
from math import ceil, floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglight.report.charts import BOTTOM, HEIGHT, RIGHT, TOP, WIDTH, Axis, Line, draw, ticks


def line(xs, ys, spread=None) -> Line:
    spread = None if spread is None else np.array(spread, dtype=float)
    return Line(0, "c0 d0", "a", np.array(xs, dtype=float), np.array(ys, dtype=float), spread)


def corners(path: str) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in re.findall(r"([-\d.]+) ([-\d.]+)", path)]


def test_points_lie_where_the_axes_say():
    chart = draw("", Axis("x", limits=(0, 10)), Axis("y", limits=(0, 2)), [line([0, 5, 10], [0, 1, 2])])
    left = chart.left
    middle = ((left + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
    assert corners(chart.marks[0].path) == [(left, HEIGHT - BOTTOM), middle, (WIDTH - RIGHT, TOP)]
    assert {text: at for at, text in chart.x_ticks}["10"] == WIDTH - RIGHT


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors_and_no_room_for_zero():
    chart = draw("", Axis("x"), Axis("y", log=True), [line([0, 1, 2, 3], [0, 0.01, 0.1, 1])])
    ys = [y for _, y in corners(chart.marks[0].path)]
    assert len(ys) == 3 and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.11)
    assert {"0.01", "0.1", "1"} <= {text for _, text in chart.y_ticks}


def test_a_band_encloses_its_line():
    mark = draw("", Axis("x"), Axis("y"), [line([0, 1], [1, 2], [0.5, 0.25])]).marks[0]
    (_, up), (_, up_2), (_, low_2), (_, low) = corners(mark.band)
    (_, y), (_, y_2) = corners(mark.path)
    assert up < y < low and y - up == pytest.approx(low - y, abs=0.11)
    assert up_2 < y_2 < low_2
    assert draw("", Axis("x"), Axis("y"), [line([0, 1], [1, 2], [0, 0])]).marks[0].band == ""


def test_differences_of_nothing_are_drawn_as_nothing():
    chart = draw("", Axis("x"), Axis("y"), [line([0, 1], [1.0, 1.000001])])
    (_, y), (_, y_2) = corners(chart.marks[0].path)
    assert y == pytest.approx(y_2, abs=0.11)
    assert all(len(text) <= 6 for _, text in chart.y_ticks)


def test_what_is_no_number_is_left_out_and_nothing_gives_no_chart():
    chart = draw("", Axis("x"), Axis("y"), [line([0, np.nan, 2], [1, 1, 2]), line([np.nan], [1])])
    assert [len(mark.points) for mark in chart.marks] == [2]
    assert draw("", Axis("x"), Axis("y"), [line([np.nan], [1])]) is None
    assert draw("", Axis("x"), Axis("y"), []) is None


@given(
    st.floats(-1e7, 1e7), st.floats(1e-4, 1e7), st.booleans(), st.booleans(), st.sampled_from([1.0, 100.0])
)
def test_an_axis_has_a_few_round_numbers_between_its_ends(low, span, log, whole, factor):
    ends = (abs(low) + 1e-6, abs(low) + 1e-6 + span) if log else (low, low + span)
    if ends[1] - ends[0] < 1e-9 * abs(ends[1]) * 1e3:
        return  # less than the digits of a label can tell
    found = ticks(ends, Axis("", log, factor, whole=whole))
    places = [at for at, _ in found]
    room = 1e-6 * (abs(ends[0]) + abs(ends[1]))
    assert all(ends[0] - room <= at <= ends[1] + room for at in places)
    assert len(places) <= 12 and places == sorted(places)
    assert len(places) >= 2 or whole
    if whole and not log and ceil(ends[0] * factor) <= floor(ends[1] * factor):  # a whole number lies between
        assert all((at * factor) == pytest.approx(round(at * factor)) for at in places)


@pytest.mark.parametrize(
    ("ends", "axis", "texts"),
    [
        ((0, 1), Axis(""), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ((0.93, 0.98), Axis("", factor=100), ["93", "94", "95", "96", "97", "98"]),
        ((0, 12_000), Axis(""), ["0", "2k", "4k", "6k", "8k", "10k", "12k"]),
        ((0, 2), Axis("", whole=True), ["0", "1", "2"]),
        ((1e-5, 1.0), Axis("", log=True), ["1e-5", "1e-4", "0.001", "0.01", "0.1", "1"]),
        ((0.9, 4), Axis("", log=True), ["1", "2", "3", "4"]),
    ],
)
def test_numbers_at_an_axis(ends, axis, texts):
    assert [text for _, text in ticks(ends, axis)] == texts
