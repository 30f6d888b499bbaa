"""The command, from its arguments to its files."""

import subprocess
import sys

import pytest

from sglight.report.__main__ import main
from tests.report.common import config, curve, results, write_run


@pytest.fixture
def outputs(tmp_path):
    for strategy in ("backprop", "dni"):
        for seed in (1, 2):
            write_run(
                tmp_path / "outputs" / f"{seed}-{strategy}", config(strategy, seed), results(0.9), curve()
            )
    return tmp_path / "outputs"


def test_a_comparison_is_printed_and_written(outputs, tmp_path, capsys):
    page, table = tmp_path / "new" / "page.html", tmp_path / "runs.csv"
    main([str(outputs), "--html", str(page), "--csv", str(table), "--by", "strategy,model"])
    told = capsys.readouterr()
    assert "dni" in told.out and "90.00 ± 0.00 %" in told.out
    assert f"written: {page}" in told.err
    assert page.read_text().startswith("<!doctype html>") and "../outputs/1-dni/" in page.read_text()
    assert len(table.read_text().splitlines()) == 5


def test_markdown_goes_to_the_output_alone(outputs, capsys):
    main([str(outputs), "--markdown", "--target", "0.8"])
    out = capsys.readouterr().out
    assert out.startswith("### digits\n") and "time to 80.00 %" in out


def test_outputs_is_where_runs_are_looked_for(outputs, monkeypatch, capsys):
    monkeypatch.chdir(outputs.parent)
    main([])
    assert "backprop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere is no folder"),
        (["empty"], "no runs in empty; give the folder of one"),
        (["outputs", "--by", "stepz"], "--by stepz: no run has this key"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(outputs, monkeypatch, arguments, sentence):
    monkeypatch.chdir(outputs.parent)
    (outputs.parent / "empty").mkdir()
    with pytest.raises(SystemExit, match=f"error: {sentence}"):
        main([*arguments, "--html", "page.html"])
    assert not (outputs.parent / "page.html").exists()


@pytest.mark.parametrize("target", ["97", "0", "much"])
def test_an_impossible_target(outputs, capsys, target):
    with pytest.raises(SystemExit):
        main([str(outputs), "--target", target])
    assert f"{target} is no accuracy; give a number above 0, at most 1" in capsys.readouterr().err


def test_the_command_starts_without_torch(outputs):
    code = (
        "import runpy, sys; sys.argv = ['sglight.report', sys.argv[1]]\n"
        "runpy.run_module('sglight.report', run_name='__main__')\n"
        "assert not {'torch', 'matplotlib', 'pytorch_lightning', 'hydra'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(outputs)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "backprop" in done.stdout
