"""The private parts of multiprocessing that sglight depends on are still there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("multiprocessing.forkserver")


def test_the_server_has_a_process_once_it_runs() -> None:
    script = (
        "from multiprocessing import forkserver; from sglight.compat.multiprocessing import forkserver_pid\n"
        "assert forkserver_pid() is None; forkserver.ensure_running(); assert forkserver_pid() > 0\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_sockets_are_made_where_they_are_told(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from multiprocessing import util\n"
        "from sglight.compat.multiprocessing import set_temporary_folder\n"
        "set_temporary_folder(Path(sys.argv[1])); assert util.get_temp_dir() == sys.argv[1]\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60)
