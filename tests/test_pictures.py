"""The pictures of the documentation come out of its script."""

import importlib.util
import re

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_schedule_is_drawn_and_shown(script, tmp_path):
    script.schedules(tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.png")}
    page = (ROOT / "docs" / "strategies.md").read_text()
    assert drawn == set(re.findall(r"pictures/(schedule-\w+\.png)", page))


def test_what_is_shown_of_a_recording_is_cut_at_both_ends_and_leaves_waiting_out(script):
    spans = [
        script.Span(*each)
        for each in (("forward", 0, 0, 0.0, 1.0), ("wait", 0, 0, 1.0, 2.0), ("backward", 0, 0, 2.0, 4.0))
    ]
    assert script.start_of([spans], 0) == 0.0
    shown = script.clipped(spans, 0.5, 3.0)
    assert [(s.phase, s.start, s.end) for s in shown] == [
        ("forward", 0.0, 500.0),
        ("backward", 1500.0, 2500.0),
    ]
