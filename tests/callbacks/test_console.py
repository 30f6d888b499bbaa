"""What a run prints fits into 80 columns, and its paths can be copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from sglight.callbacks.console import (
    Summary,
    all_parameter_counts,
    print_results,
    print_summary,
)
from sglight.commandline import tensorboard
from sglight.strategies.dni import DNI
from sglight.strategies.local import Local
from tests.callbacks.common import NETWORK, data, fit


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_summary_names_what_is_about_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    trainer = fit([], tmp_path, epochs=1)
    capsys.readouterr()
    module: Any = trainer.lightning_module
    counts = all_parameter_counts(module)
    source: Any = trainer.datamodule  # type: ignore[attr-defined]
    print_summary(module, counts, [range(2)], source, trainer, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    for part in (
        "ellipse: 120 training",
        "hamiltonian, dense",
        "4 steps of size 0.5",
        "2 stages, lag 1",
        "cpu, 1 thread",
        "seed 3",
    ):
        assert part in text
    assert any(line.endswith(str(tmp_path / "run")) for line in lines)
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= width
    assert "parameters" in text and "estimator's" in text and "…" not in text
    assert "advice Prefer strategy=" in text


def test_a_run_is_announced_once_its_network_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = fit([Summary(tmp_path / "run")], tmp_path, epochs=1)
    trainer.test(trainer.lightning_module, trainer.datamodule, verbose=False)  # type: ignore[attr-defined]
    assert capsys.readouterr().out.count(str(tmp_path / "run")) == 1


def test_the_schedule_is_printed_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for schedule in (False, True):
        fit([Summary(tmp_path / "run", schedule)], tmp_path, epochs=1)
        out = capsys.readouterr().out
        assert ("[stage] F forward" in out) == schedule
        assert ("with one worker every" in out) == schedule


def test_results_are_shown_with_units_and_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "a run"
    print_results({"test/acc": 0.98765, "time/fit_s": 300, "memory/peak_bytes": 2**30}, folder, True)
    out = capsys.readouterr().out
    assert "98.77 %" in out
    assert "5.00 min" in out
    assert "1.07 GB" in out
    assert f"{tensorboard()} --logdir '{folder}'" in out
    print_results({}, folder, False)
    assert "tensorboard" not in capsys.readouterr().out


@pytest.mark.parametrize(("hidden", "warned"), [([4], False), ([400], True)])
@pytest.mark.parametrize(("kind", "section"), [(DNI, "estimator"), (Local, "head")])
def test_estimators_larger_than_the_network_are_warned_of(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: type,
    section: str,
    hidden: list[int],
    warned: bool,
) -> None:
    module = kind({**NETWORK, "channels": 8}, {"name": "adam"}, **{section: {"hidden": hidden}})
    pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, fast_dev_run=True,
        callbacks=[Summary(tmp_path)], default_root_dir=tmp_path,
    ).fit(module, data())  # fmt: skip
    assert (f"strategy.{section}.hidden" in " ".join(capsys.readouterr().out.split())) == warned
