"""Overrides that are quoted for Hydra and for a shell: both read the text that was meant."""

import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st

from sglight.config.composing import CONF
from sglight.config.explanations import explain
from sglight.config.quoting import quoted, typed

# What Hydra, a shell or a regular expression may stumble over.
TEXTS = st.text(alphabet="ab /\\'\"`$!,=:[](){}~*ü\t", min_size=1, max_size=12).filter(
    lambda text: "${" not in text  # a reference to another key, also in quotes
)


def read(override: str) -> object:
    return OverridesParser.create().parse_override(override).value()


@given(TEXTS)
def test_hydra_reads_a_quoted_text_as_it_is(text: str) -> None:
    assert read(f"key={quoted(text)}") == text


@given(TEXTS.filter(lambda text: not set("$`") & set(text)))  # which shlex takes as they are in quotes
def test_a_shell_and_hydra_read_a_typed_text_as_it_is(text: str) -> None:
    (word,) = shlex.split(typed("key", text))
    assert read(word) == text


def test_a_shell_expands_nothing() -> None:
    text = "it's $HOME and `pwd`, \\"
    word = subprocess.run(
        ["sh", "-c", f"printf %s {typed('key', text)}"], capture_output=True, text=True, check=True
    )
    assert read(word.stdout) == text


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("a'b", r'''"dataset.name=\"a'b\""'''),
        ("'a", r'''"dataset.name=\"'a\""'''),
        ('say "a', r'''"dataset.name='say \"a'"'''),
        ("it's \"a", r'''"dataset.name=\"it's \\\"a\""'''),
        ("[a,b", """\'dataset.name="[a,b"\'"""),
    ],
)
def test_the_hint_for_a_value_that_cannot_be_read_can_be_typed(value: str, hint: str) -> None:
    with pytest.raises(HydraException) as raised:
        OverridesParser.create().parse_overrides([f"dataset.name={value}"])
    told = explain(raised.value, CONF)
    assert told.startswith(f"dataset.name={value} cannot be read; close its brackets and quotes, or ")
    assert told.endswith(f" in quotes: {hint}")
    (word,) = shlex.split(hint)
    assert read(word) == value
