"""What accuracy costs, in one process and with a worker for each stage; the page that a sweep draws."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from sglight.report.drawing import DrawSweep
from sglight.report.groups import tasks
from sglight.report.measures import compare
from sglight.report.panels import panels
from sglight.report.runs import find_runs
from tests.report.common import config, curve, results, write_run

IDEAL = "Test accuracy and the ideal time with a worker for each stage"


def sweep(folder: Path, workers: int = 1) -> Path:
    """One stage that took 10 s, and four that took 30 s and would have taken 10 s."""
    write_run(folder / "0", config(strategy__stages=1), results(0.98), curve())
    four = {"time__fit_s": 30.0, "speedup__theoretical": 3.0, "run__workers": workers}
    write_run(folder / "1", config("local", strategy__stages=4), results(0.97, **four), curve())
    return folder


def titles(folder: Path) -> list[str]:
    (task,) = tasks(find_runs([folder]), [])
    return [chart.title for panel in panels(compare(task, None)) for chart in panel.charts]


def test_the_ideal_time_is_shown_where_there_is_one(tmp_path: Path) -> None:
    assert any(title.startswith(IDEAL) for title in titles(sweep(tmp_path / "one")))
    assert not any(title.startswith(IDEAL) for title in titles(sweep(tmp_path / "four", workers=4)))


def test_a_sweep_draws_its_page(tmp_path: Path) -> None:
    folder = sweep(tmp_path)
    DrawSweep().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(folder)}}}))
    assert IDEAL in (folder / "report.html").read_text()
