"""What a run leaves behind while it goes on, and when it ends in one way or another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglight import status


def written(folder: Path) -> dict:
    return json.loads((folder / status.FILE).read_text())


def test_a_run_is_running_then_finished(tmp_path):
    with status.recorded(tmp_path):
        assert status.read(tmp_path)["status"] == "running"
        assert written(tmp_path)["pid"] == os.getpid()
    assert status.read(tmp_path)["status"] == "finished"
    assert [p.name for p in tmp_path.iterdir()] == [status.FILE]


def test_a_failure_keeps_its_reason_and_goes_on(tmp_path):
    with pytest.raises(ValueError, match="no such"), status.recorded(tmp_path):
        raise ValueError("no such\n thing")
    told = status.read(tmp_path)
    assert told["status"] == "failed"
    assert told["reason"] == "ValueError: no such thing"


def test_an_interruption_is_no_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), status.recorded(tmp_path):
        raise KeyboardInterrupt
    assert status.read(tmp_path)["status"] == "interrupted"

    def as_lightning_does() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    with pytest.raises(SystemExit), status.recorded(tmp_path):
        as_lightning_does()
    assert status.read(tmp_path)["status"] == "interrupted"


def test_a_run_that_was_killed_is_told_from_one_that_goes_on(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from sglight import status\n"
        "with status.recorded(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert written(tmp_path)["status"] == "running"
    assert status.read(tmp_path)["status"] == "stopped"


def test_a_run_on_another_machine_is_believed(tmp_path):
    (tmp_path / status.FILE).write_text(
        json.dumps({"status": "running", "host": "elsewhere", "pid": 1 << 30})
    )
    assert status.read(tmp_path)["status"] == "running"


@pytest.mark.parametrize("text", ["", '{"status": "runn', "[]", '{"status": 3}'])
def test_a_damaged_status_says_nothing(tmp_path, text):
    (tmp_path / status.FILE).write_text(text)
    assert status.read(tmp_path) == {}
