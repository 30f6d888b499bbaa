"""Executes the notebooks in place, each in an empty folder: python docs/notebooks/execute.py"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, executed in ``folder``; raises at the first cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or [path.name for path in sorted(FOLDER.glob("*.ipynb"))]:
        with tempfile.TemporaryDirectory() as empty:
            nbformat.write(execute(FOLDER / name, Path(empty)), FOLDER / name)
