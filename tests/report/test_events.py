"""Curves from events and from a CSV log, whole and in pieces."""

import numpy as np
import pytest

from sglight.report.events import read_curves
from tests.report.common import STARTED, write_events


def test_a_curve_has_steps_seconds_and_values(tmp_path):
    write_events(tmp_path, [("a", 0, 5.0, 1.5), ("b", 3, 6.0, 7.0), ("a", 9, 7.5, 0.25)])
    curves = read_curves(tmp_path)
    assert curves.keys() == {"a", "b"}
    assert [list(column) for column in curves["a"]] == [[0, 9], [0.0, 2.5], [1.5, 0.25]]


def test_the_clock_begins_with_the_training_not_with_the_columns_of_hparams(tmp_path):
    write_events(tmp_path, [("val/acc", 0, 0.0, float("nan")), ("lr", 0, 4.0, 0.1), ("val/acc", 9, 6.0, 0.5)])
    curves = read_curves(tmp_path)
    assert list(curves["val/acc"].step) == [9]
    assert list(curves["val/acc"].elapsed) == [2.0]


def test_a_file_that_ends_anywhere_gives_what_is_whole(tmp_path):
    """Every prefix of the file is a state in which a reader may find it."""
    path = write_events(tmp_path / "whole", [("a", k, float(k), 0.5) for k in range(6)])
    data, counts = path.read_bytes(), []
    for size in range(0, len(data) + 1, 7):
        part = tmp_path / str(size)
        part.mkdir()
        (part / path.name).write_bytes(data[:size])
        counts.append(len(read_curves(part)["a"].step) if read_curves(part) else 0)
    assert counts == sorted(counts)
    assert set(counts) == set(range(max(counts) + 1)) and max(counts) >= 5


def test_a_damaged_record_ends_the_file_and_nothing_else(tmp_path):
    path = write_events(tmp_path, [("a", k, float(k), 0.5) for k in range(6)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    assert 0 < len(read_curves(tmp_path)["a"].step) < 6


def test_a_training_that_went_on_in_its_folder_counts_neither_pauses_nor_what_it_repeated(tmp_path):
    write_events(tmp_path, [("a", k, float(k), 0.0) for k in range(5)], ".0")
    write_events(tmp_path, [("a", k, 100.0 + k, 1.0) for k in (3, 4, 5)], ".1")
    curve = read_curves(tmp_path)["a"]
    assert list(curve.step) == [0, 1, 2, 3, 4, 5]
    assert list(curve.value) == [0, 0, 0, 1, 1, 1]
    # The second session begins where step 2 was left, at 2 s.
    assert list(curve.elapsed) == [0, 1, 2, 2, 3, 4]
    assert STARTED > 0


def test_a_csv_log_has_no_times_and_its_last_row_may_be_half_written(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,val/acc\n0,9,0.5\n1,,0.6\n1,19,0.75\n2,29,0.")
    curves = read_curves(tmp_path)
    assert list(curves["val/acc"].step) == [9, 19]
    assert np.isnan(curves["val/acc"].elapsed).all()


@pytest.mark.parametrize("name", ["events.out.tfevents.1.x", "metrics.csv"])
@pytest.mark.parametrize("data", [b"", b"\x00\xff\xfe nonsense", b"step\n,,,\n\n"])
def test_nonsense_gives_no_curves(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert read_curves(tmp_path) == {}
    assert read_curves(tmp_path / "missing") == {}
