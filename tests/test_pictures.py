"""The pictures of the documentation come out of its script."""

import importlib.util
import re

import pytest

from tests.conftest import ROOT
from tests.report.common import config, write_run


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


def test_the_frontier_has_means_over_seeds_by_strategy_and_stages(script, tmp_path):
    for number, (stages, seconds, accuracy, ideal) in enumerate(
        [(1, 10.0, 0.95, None), (4, 30.0, 0.9, 3.0), (4, 50.0, 0.8, 2.0)]
    ):
        metrics = {"test/acc": accuracy, "time/cpu_s": seconds, "run/stages": stages}
        metrics |= {"speedup/theoretical": ideal} if ideal else {}
        write_run(tmp_path / str(number), config("dni", seed=number), metrics)
    write_run(tmp_path / "failed", config("dni", seed=9), status={"status": "failed", "reason": "no"})
    found = script.means(tmp_path)
    assert found == {
        ("dni", 1): pytest.approx((95, 10, 10)),
        ("dni", 4): pytest.approx((85, 40, 17.5)),
    }
    script.frontier(tmp_path, tmp_path)
    assert (tmp_path / "frontier.png").stat().st_size > 1000
