"""What we lean on in multiprocessing is still there."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("multiprocessing.forkserver")


def test_the_server_has_a_process_once_it_runs() -> None:
    script = (
        "from multiprocessing import forkserver; from sglight.compat.multiprocessing import forkserver_pid\n"
        "assert forkserver_pid() is None; forkserver.ensure_running(); assert forkserver_pid() > 0\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
