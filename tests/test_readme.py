"""What the documents say can be done and found: commands compose, Python runs, links lead somewhere.

`make docs` checks links to sections too; tests/test_extending.py runs the files of docs/extending.md.
"""

import re
import shlex
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from sglight.config.composing import CONF, check

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
PRESETS = sorted((CONF / "experiment").rglob("*.yaml"))
COMMAND = re.compile(
    r"(?:python -m sglight |`(?=(?:-m )?(?:experiment|strategy|model|dataset)=))(?!\.)([^`#\n]*)"
)
PYTHON = re.compile(r"^( *)```python\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# \S+/\S+\.py\n")  # of tests/test_extending.py
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
# Of which the reader is to put in a part, or which need the files of the section.
INCOMPLETE = (
    "...", "--help", "--config-dir", "--cfg", "ckpt=last", "hydra/launcher", "pictures.tar", "raw_dir=pictures",
    "arrays.h5", "\\",
)  # fmt: skip


def commands() -> list[str]:
    """The arguments of all commands that are whole, without repetitions."""
    texts = [path.read_text() for path in (*DOCUMENTS, *PRESETS)]
    found = dict.fromkeys(match.strip() for text in texts for match in COMMAND.findall(text))
    whole = [each for each in found if not any(part in each for part in INCOMPLETE)]
    # The name of a choice, which needs pictures, is no command.
    return [each for each in whole if each != "dataset=image_folder"]


@pytest.mark.parametrize("arguments", commands())
def test_every_command_composes(compose_config, arguments):
    given = [word for word in shlex.split(arguments) if word != "-m" and "raw_dir" not in word]
    first, last = [], []
    for override in OverridesParser.create().parse_overrides(given):
        name = override.get_key_element()
        if override.is_sweep_override():
            values = list(override.sweep_string_iterator())
        else:
            values = [override.get_value_element_as_str()]
        first.append(f"{name}={values[0]}")
        last.append(f"{name}={values[-1]}")
    for overrides in (first, last):
        check(compose_config(*overrides))


def links(document: Path) -> list[str]:
    """Those to other files."""
    return [link for link in LINK.findall(document.read_text()) if "://" not in link]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    assert not [link for link in links(document) if not (document.parent / link).exists()]


def test_links_are_found():
    assert "docs/extending.md" in links(ROOT / "README.md")


def python() -> list[tuple[str, str]]:
    """Documents and the Python in them that is no file."""
    found = [(path.name, dedent(code)) for path in DOCUMENTS for _, code in PYTHON.findall(path.read_text())]
    return [(name, code) for name, code in found if not FILE.match(code)]


@pytest.mark.timeout(300)  # the first that needs workers waits for a server of processes to import torch
@pytest.mark.parametrize(("document", "code"), python())
def test_python_runs(start, tmp_path, monkeypatch, document, code):
    if document == "CONTRIBUTING.md":  # a method out of a class
        assert code.strip() in dedent(
            (ROOT / "sglight/networks/dynamics.py").read_text().replace("\n    ", "\n")
        )
        return
    if "outputs/.../run" in code:
        start(tmp_path / "run")
        code = code.replace("outputs/.../run", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    x = torch.randn(64, 2)
    batches = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 16)
    names: dict[str, Any] = {"__name__": "__main__", "pictures": x, "batches": batches}
    exec(code, names)
    if "trainer" in names:
        assert names["trainer"].global_step == names["trainer"].max_epochs * len(names["batches"])
    else:
        assert len(names["names"]) == len(x)
