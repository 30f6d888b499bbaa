"""Overrides as Hydra reads them and as they are typed in a shell; imports no torch."""

from __future__ import annotations

import re
import shlex


def quoted(text: str) -> str:
    r"""A text in quotes, which Hydra reads as this text.

    >>> print(quoted("/a/b,c"), quoted('the "best"'), quoted('it\'s the "best"'))
    "/a/b,c" 'the "best"' "it's the \"best\""
    """
    quote = "'" if '"' in text and "'" not in text else '"'

    # Hydra takes a backslash as it is, except before a quote and at the end.
    def escaped(found: re.Match[str]) -> str:
        return found[1] * 2 + (f"\\{quote}" if found[2] else "")

    return quote + re.sub(rf"(\\*)({quote}|\Z)", escaped, text) + quote


def typed(key: str, text: str) -> str:
    r"""An override whose value is a text, as it is typed in a shell.

    >>> print(typed("ckpt", "/a/b"), typed("ckpt", "/a/b,c"), typed("ckpt", "it's"))
    ckpt=/a/b 'ckpt="/a/b,c"' "ckpt=\"it's\""
    """
    plain = re.fullmatch(
        r"[\w.+%@-]*(/[\w.+%@-]*)+", text, re.ASCII
    )  # nothing but a path, and no number or null
    word = f"{key}={text if plain else quoted(text)}"
    if "'" not in word:
        return shlex.quote(word)
    escaped = re.sub(r'([\\"$`])', r"\\\1", word)
    return f'"{escaped}"'
