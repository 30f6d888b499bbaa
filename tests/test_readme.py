"""What the documents say can be done and found: every command composes, every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from sglight.config.composing import CONF, check

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PRESETS = sorted((CONF / "experiment").rglob("*.yaml"))
COMMAND = re.compile(
    r"(?:python -m sglight |`(?=(?:-m )?(?:experiment|strategy|model|dataset)=))(?!\.)([^`#\n]*)"
)
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
# Of which the reader is to put in a part, or which need the files of the section.
INCOMPLETE = ("...", "--help", "--config-dir", "ckpt=last", "hydra/launcher", "pictures.tar", "arrays.h5")


def commands() -> list[str]:
    """The arguments of all commands that are whole, without repetitions."""
    texts = [path.read_text() for path in (*DOCUMENTS, *PRESETS)]
    found = dict.fromkeys(match.strip() for text in texts for match in COMMAND.findall(text))
    return [each for each in found if not any(part in each for part in INCOMPLETE)]


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document):
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    assert links
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing
