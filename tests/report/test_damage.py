"""Folders with which somebody wants to end the report, or happens to: the others are told of all the same."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sglight.report.__main__ import main
from sglight.report.reading import cleaned, resolved
from sglight.report.runs import find_runs, read_config, read_run
from tests.report.common import config, results, write_run


def bomb(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    (folder / "config.yaml").write_text(
        "\n".join([*lines, "dataset: {name: *a11}", "model: {}", "strategy: {}"])
    )


def replace(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return damage


def special(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


DAMAGED = {
    "alias bomb": bomb,
    "deep JSON": replace("metrics.json", "[" * 100_000),
    "deep YAML": replace("config.yaml", "a: " + "[" * 3000 + "]" * 3000),
    "pipe": special("metrics.json", os.mkfifo),
    "pipe of a config": special("config.yaml", os.mkfifo),
    "endless": special("metrics.json", lambda path: path.symlink_to("/dev/zero")),
    "endless status": special("status.json", lambda path: path.symlink_to("/dev/zero")),
    "no text": special("metrics.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "a list": replace("metrics.json", "[1]"),
}
ODD = {
    "400 digits": replace("metrics.json", json.dumps(results() | {"odd": 10**399})),
    "another hydra.yaml": replace(
        ".hydra/hydra.yaml", "hydra: {runtime: {choices: {dataset: [1, {a: 2}], model: 3}}}"
    ),
    "pipe of events": special("events.out.tfevents.1", os.mkfifo),
    "pipe of a table": special("metrics.csv", os.mkfifo),
}


@pytest.mark.parametrize("case", [*DAMAGED, *ODD])
def test_one_bad_folder_does_not_end_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    for name in ("bad", "good"):
        write_run(tmp_path / name, config(seed=2 if name == "bad" else 1), results(0.9))
    (DAMAGED | ODD)[case](tmp_path / "bad")
    states = {run.folder.name: run.state for run in find_runs([tmp_path])}
    assert states["good"] == "finished"
    if case in DAMAGED and case != "endless status":
        assert states["bad"] == "damaged"
    main([str(tmp_path), "--csv", str(tmp_path / "table.csv"), "--html", str(tmp_path / "page.html")])
    assert "90.00" in capsys.readouterr().out


def test_whatever_goes_wrong_with_a_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "a", config(), results())

    def fail(*_: object) -> None:
        raise KeyError("a\x1b[2Jbug")

    monkeypatch.setattr("sglight.report.runs.read_curves", fail)
    run = read_run(tmp_path / "a")
    assert run.state == "damaged" and "KeyError" in run.reason and "\x1b" not in run.reason


def test_a_dev_run_is_not_damaged(tmp_path: Path) -> None:
    write_run(tmp_path / "a", config(trainer__fast_dev_run=True), None, status={"status": "finished"})
    assert read_run(tmp_path / "a").state == "tried"


def test_variables_of_the_reader_do_not_get_into_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "42")
    given = {"seed": 3, "dataset": {"name": "${oc.env:SECRET}", "seed": "${seed}", "loop": "${dataset.loop}"}}
    assert resolved(given)["dataset"] == given["dataset"] | {"seed": 3}


def test_formulas_and_control_sequences_stay_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in ((1, "=cmd|'/c calc'!A1"), (2, "\x1b]0;owned\x07"), (3, "-1")):
        write_run(tmp_path / str(seed), config(seed=seed, dataset__name=name), results())
    (tmp_path / "2/status.json").write_text(json.dumps({"status": "failed", "reason": "\x1b[31mred\x9b"}))
    main([str(tmp_path), "--csv", str(tmp_path / "table.csv")])
    out, text = capsys.readouterr().out, (tmp_path / "table.csv").read_text()
    assert not {"\x1b", "\x07", "\x9b"} & {*out, *text}
    cells = [cell for row in csv.reader(text.splitlines()) for cell in row]
    assert "'=cmd|'/c calc'!A1" in cells and "-1" in cells and not any(cell.startswith("=") for cell in cells)
    assert cleaned({"a\x1b": ["\u202e", 3]}) == {"a\ufffd": ["\ufffd", 3]}
    assert read_config(tmp_path / "3")["dataset.name"] == "-1"


@pytest.mark.skipif(os.name == "nt", reason="POSIX names")
def test_a_folders_name_may_be_no_text(tmp_path: Path) -> None:
    for name in (b"\xff", b"\x1b[2J"):
        write_run(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))), config(), results())
    main([str(tmp_path), "--html", str(tmp_path / "page.html"), "--csv", str(tmp_path / "table.csv")])
    for name in ("page.html", "table.csv"):
        assert "\x1b" not in (tmp_path / name).read_text(encoding="utf-8")
    assert 'href="%FF/"' in (tmp_path / "page.html").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux's")
def test_the_report_on_a_full_disk_or_in_ascii(tmp_path: Path) -> None:
    import subprocess
    import sys

    write_run(tmp_path / "a", config(), results())
    command = [sys.executable, "-m", "sglight.report", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr
