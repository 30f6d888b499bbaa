"""Commands that are printed run this very Python when they are typed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from sglight import commandline
from sglight.commandline import python, tensorboard


def test_a_program_on_the_path_goes_by_its_name(tmp_path, monkeypatch):
    program = tmp_path / "bin dir" / "python"
    program.parent.mkdir()
    shutil.copy("/bin/sh", program)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("PATH", str(program.parent))
    assert python("sglight") == "python -m sglight"
    monkeypatch.setenv("PATH", "/nowhere")
    assert python("sglight") == f"'{program}' -m sglight"
    monkeypatch.chdir(tmp_path)
    assert python("sglight") == "'bin dir/python' -m sglight"
    assert tensorboard() == "'bin dir/python' -m tensorboard.main"  # no script beside it
    program.with_name("tensorboard").touch()
    assert tensorboard() == "'bin dir/tensorboard'"


def test_the_printed_command_runs(tmp_path):
    done = subprocess.run(
        f"{python('sglight.report')} --help", shell=True, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(Path(commandline.__file__).parents[1])},
    )  # fmt: skip
    assert "--by" in done.stdout
