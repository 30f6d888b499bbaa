"""The notebooks run from their first cell to their last, and have kept what they gave."""

import sys

import pytest

from tests.conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="the extra docs is not installed")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "notebooks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", f"{sys.exec_prefix}/bin", prepend=":")
    from execute import execute

    executed = execute(path, tmp_path)
    printed = "".join(o.get("text", "") for c in executed.cells for o in c.get("outputs", ()))
    assert "error:" not in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_every_cell_gave(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
