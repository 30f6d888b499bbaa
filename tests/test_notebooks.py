"""The notebooks run from their first cell to their last, and have kept what they gave."""

import os
import shlex
import sys
import traceback
from functools import wraps

import pytest

from tests.commands import Forked, run_sglight
from tests.conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="the extra docs is not installed")
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def run_notebook(arguments: list[str]) -> None:
    """Run the cells in IPython, without a kernel; its ``!`` commands are forked from this process.

    Trainings of its own are short.
    """
    import pytorch_lightning as pl
    from IPython.core.interactiveshell import InteractiveShell

    whole = pl.Trainer.__init__

    @wraps(whole)
    def short(self, *args, **options):
        whole(self, *args, **{**options, "max_epochs": 2, "limit_train_batches": 6})

    pl.Trainer.__init__ = short
    shell = InteractiveShell.instance()
    shell.system = run_command
    for cell in nbformat.read(arguments[0], as_version=4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()


def run_command(line: str) -> None:
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "sglight"], line
    import pytorch_lightning as pl

    if not (child := os.fork()):
        try:
            pl.Trainer.__init__ = pl.Trainer.__init__.__wrapped__
            run_sglight(words[3:])
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    pytest.importorskip("IPython")
    status, out, err = Forked(str(path), cwd=tmp_path, main=run_notebook, MPLBACKEND="agg").end()
    assert status == 0, out + err
    assert "error:" not in out + err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_every_cell_gave(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
