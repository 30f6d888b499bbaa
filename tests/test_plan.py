"""The command that plans; what it computes is tested with `sglight.planning`."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from sglight import plan
from sglight.planning import Machines

FAST = "plan.flops=1e9"


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["plan", *words])
    plan.main()


def test_it_prints_the_best_split(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command(monkeypatch, "strategy=delayed", "model.steps=16", "plan.workers=4", FAST, "plan.bandwidth=1e12")
    out = capsys.readouterr().out
    assert "groups" in out and "computing" in out, "no cell is cut off"
    assert "trainer.devices x trainer.num_nodes = 4" in out


def test_help_names_every_key(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command(monkeypatch, "--help")
    out = capsys.readouterr().out
    for field in fields(Machines):
        assert f"  plan.{field.name}=" in out


def test_help_needs_no_torch() -> None:
    code = "import sys; from sglight import plan; plan.main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("strategy", ["multilevel", "pvd"])
def test_what_has_no_schedule_of_its_own_is_refused(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match=f"strategy={strategy} cannot be planned"):
        command(monkeypatch, f"strategy={strategy}", "plan.workers=2", FAST)
