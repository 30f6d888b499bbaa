"""Where a run says what has become of it."""

import pytest

from sglight import start, status
from sglight.config.checks import TORCHRUN


def test_a_run_records_its_end(tmp_path, monkeypatch, compose_config):
    monkeypatch.setattr(start, "_run", lambda *_: 0.5)
    assert start.run(compose_config(), tmp_path) == 0.5
    assert status.read(tmp_path)["status"] == "finished"


def test_a_failed_run_records_why(tmp_path, monkeypatch, compose_config):
    def fail(*_):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(start, "_run", fail)
    with pytest.raises(RuntimeError):
        start.run(compose_config(), tmp_path)
    assert status.read(tmp_path)["reason"] == "RuntimeError: no memory left"


@pytest.mark.parametrize("rank", [0, 1])
def test_of_torchruns_workers_the_first_records(tmp_path, monkeypatch, compose_config, rank):
    monkeypatch.setattr(start, "_run", lambda *_: 0.5)
    monkeypatch.setenv(TORCHRUN, "x")
    monkeypatch.setenv("RANK", str(rank))
    start.run(compose_config("trainer.devices=2"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ([status.FILE] if rank == 0 else [])
