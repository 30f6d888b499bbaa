"""After its first batches a run says how long an epoch will take."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglight.callbacks import forecast as module
from sglight.callbacks.forecast import Forecast, forecast
from tests.callbacks.common import fit


def test_all_epochs_that_are_left_are_counted() -> None:
    assert forecast(0.5, 7200, 20) == (
        "an epoch will take about 60.0 min (500 ms a batch), 20 epochs about 20.0 h, without validation"
    )
    assert "epochs" not in forecast(0.5, 7200, 1)


def test_a_long_epoch_is_told_once_and_a_short_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit([Forecast()], tmp_path)
    assert "an epoch will take" not in capsys.readouterr().out
    monkeypatch.setattr(module, "LEAST_S", 0.0)
    monkeypatch.setattr(module, "LEAST_BATCHES", 1)
    fit([Forecast()], tmp_path)
    assert capsys.readouterr().out.count("an epoch will take") == 1
