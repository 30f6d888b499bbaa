"""Files that are whole at any moment; imports nothing of ours."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_of(path: Path) -> Path:
    """A name beside ``path`` that no other process uses."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def remove_temporaries(folder: Path) -> None:
    """Remove what earlier processes have left half-written in a run's folder and those in it."""
    for left in (*folder.glob("*.tmp"), *folder.glob("*/*.tmp")):
        left.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to: it becomes ``path`` once all is written, and goes if anything fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a file such that it is either whole or as it was."""
    with replacing(path) as temporary:
        temporary.write_text(text)
