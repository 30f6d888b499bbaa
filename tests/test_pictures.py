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


def test_the_fastest_batches_are_shown_cut_at_both_ends_without_waiting(script):
    starts = [0.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 11.0]
    spans = [script.Span("forward", 0, k, start, start + 0.5) for k, start in enumerate(starts)]
    assert script.fastest([spans, []]) == (3.0, 8.0)
    shown = script.clipped([*spans, script.Span("wait", 0, 1, 3.5, 4.0)], 3.25, 4.25)
    assert [(s.phase, s.start, s.end) for s in shown] == [("forward", 0.0, 250.0), ("forward", 750.0, 1000.0)]
