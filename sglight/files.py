"""Writes files so that they are never incomplete; imports nothing of ours."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_of(path: Path) -> Path:
    """A name beside ``path`` that no other process uses."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def remove_temporaries(folder: Path) -> None:
    """Remove incomplete files that earlier processes have left in a run folder and in its folders."""
    for left in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp")):
        left.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context with a temporary path to write to, which then replaces ``path``; if anything fails it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file; if that fails, a file that was there stays as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text)
