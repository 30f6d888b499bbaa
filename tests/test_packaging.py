"""The wheel carries conf/ and works without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sglight
from tests.report.common import config, curve, results, write_run

ROOT = Path(__file__).resolve().parent.parent


def output(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with nothing but the unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    output(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_holds_every_config_file(site):
    in_checkout = {p.relative_to(ROOT / "conf") for p in (ROOT / "conf").rglob("*.yaml")}
    assert {
        p.relative_to(site / "sglight" / "conf") for p in (site / "sglight" / "conf").rglob("*.yaml")
    } == in_checkout
    assert not (site / "conf").exists()
    assert not (site / "tests").exists()


@pytest.mark.slow
def test_the_wheel_composes_its_own_config_anywhere(site, tmp_path):
    where = output(
        sys.executable,
        "-c",
        "import sglight.config.composing as c; print(c.CONF)",
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert Path(where.strip()) == site / "sglight" / "conf"
    printed = output(
        sys.executable, "-m", "sglight", "--cfg", "job", "model=leapfrog", cwd=tmp_path, PYTHONPATH=str(site)
    )
    assert "dynamics: leapfrog" in printed


@pytest.mark.slow
def test_the_wheel_knows_the_console_script(site):
    (points,) = site.glob("*.dist-info/entry_points.txt")
    assert "sglight = sglight.__main__:main" in points.read_text()
    assert "sglight-report = sglight.report.__main__:main" in points.read_text()


@pytest.mark.slow
def test_the_wheel_reports_without_the_checkout(site, tmp_path):
    write_run(tmp_path / "runs" / "a", config(), results(), curve())
    output(
        sys.executable, "-m", "sglight.report", "runs", "--html", "page.html", cwd=tmp_path, PYTHONPATH=str(site)
    )  # fmt: skip
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_the_console_script_of_this_environment_works(tmp_path):
    script = Path(sys.executable).with_name("sglight")
    if not script.exists():
        pytest.skip("sglight is not installed in this environment")
    assert "Usage:" in output(script, "--help", cwd=tmp_path)


def test_the_gate_can_be_started():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_package_gives_its_public_names_and_its_version_without_torch(tmp_path):
    code = "import sglight, sys; print(sglight.__version__, 'torch' in sys.modules, *dir(sglight))"
    version, torch, *names = output(sys.executable, "-c", code, cwd=tmp_path).split()
    assert torch == "False"
    assert set(names) >= set(sglight.__all__) >= {"DNI", "StableNet", "StageStrategy", "load"}
    assert all(getattr(sglight, name) is not None for name in sglight.__all__)
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert output(sys.executable, "-m", "sglight", "--version", cwd=tmp_path) == f"sglight {version}\n"
    assert (ROOT / "sglight" / "py.typed").is_file()


def test_completion_offers_choices_and_no_schemas(tmp_path):
    line = {"COMP_LINE": "sglight strategy=", "COMP_POINT": "17"}
    found = output(sys.executable, "-m", "sglight", "-sc", "query=bash", cwd=tmp_path, **line)
    assert "strategy=dni" in found and "base_" not in found
