"""Executes the notebooks in place, each in an empty folder: python docs/notebooks/execute.py"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, executed in ``folder``; raises at the first cell that fails."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return cleaned(notebook)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without times of day, colours of a terminal, and what a terminal would have overwritten."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                text = output.text.replace("\r\n", "\n")
                last = "".join(line.rpartition("\r")[2] for line in re.findall(r"[^\n]*\n?", text))
                output.text = ESCAPE.sub("", last)
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or [path.name for path in sorted(FOLDER.glob("*.ipynb"))]:
        with tempfile.TemporaryDirectory() as empty:
            nbformat.write(execute(FOLDER / name, Path(empty)), FOLDER / name)
