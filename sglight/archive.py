"""Checkpoint files without torch: sealed, so that every damage shows, and read as far as they hold plain values."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from sglight.errors import UserError

MARK = b"sglight:"
DIGEST_BYTES = 32
END = b"PK\x05\x06"  # of a ZIP archive: 22 bytes, the last two of which are the length of a comment
END_BYTES = 22
BLOCK = 1 << 20
# Under this key a checkpoint holds what `sglight.callbacks.record` knows of its run.
RECORD = "run"
# Under this one what `sglight.strategies.contents` tells of the data.
DATA = "sglight_data"
DAMAGES = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, RecursionError, MemoryError,
    struct.error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


def seal(path: Path) -> None:
    """Append a digest of the file to it, as the comment of the ZIP archive that it is."""
    with path.open("r+b") as file:
        file.seek(-END_BYTES, io.SEEK_END)
        if not file.read().startswith(END):
            raise ValueError(f"{path} is no ZIP archive without a comment")
        file.seek(-2, io.SEEK_END)
        file.write(struct.pack("<H", len(MARK) + DIGEST_BYTES))
        file.write(MARK)
        length = file.tell()
        file.seek(0)
        digest = _digest(file, length)
        file.write(digest)


def check_whole(path: Path, name: str) -> None:
    """Refuse a file that is no checkpoint, or not as it was written.

    Args:
        name: what it is called in the message, such as ``ckpt=PATH``.

    Raises:
        UserError: for any damage.
    """
    try:
        if not _is_sealed(path):
            _check_sums(path)
    except DAMAGES as error:
        raise damaged(name) from error


def read_plain(path: Path, name: str) -> dict[str, Any]:
    """What a checkpoint holds in plain values: tensors and other objects are empty dictionaries in it.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next(entry for entry in archive.namelist() if entry.endswith("/data.pkl"))
            content = _Plain(io.BytesIO(archive.read(entry))).load()
    except (*DAMAGES, StopIteration) as error:
        raise damaged(name) from error
    return content if isinstance(content, dict) else {}


def read_record(path: Path, name: str) -> dict[str, Any]:
    """What a checkpoint knows of its run, see `sglight.callbacks.record`; empty if it was written without.

    What it tells of the data is in ``data``, with the fingerprint.
    """
    content = read_plain(path, name)
    record = content.get(RECORD)
    if not isinstance(record, dict):
        return {}
    data = [part for part in (content.get(DATA), record.get("data")) if isinstance(part, dict)]
    return {**record, "data": {k: v for part in data for k, v in part.items()}} if data else record


def damaged(name: str) -> UserError:
    """The error about a file that cannot be used."""
    return UserError(
        f"{name} is damaged, or not a checkpoint of sglight; give another, such as best.ckpt or last.ckpt beside it"
    )


def _is_sealed(path: Path) -> bool:
    """Whether there is a seal; a ValueError if it is another file's."""
    length = path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        file.seek(max(length - len(MARK), 0))
        if file.read(len(MARK)) != MARK:
            return False
        expected = file.read()
        file.seek(0)
        if _digest(file, length) != expected:
            raise ValueError("the digest is another one")
    return True


def _check_sums(path: Path) -> None:
    """Check the sums of the archive, of a checkpoint that nobody has sealed."""
    with zipfile.ZipFile(path) as archive:
        if (entry := archive.testzip()) is not None:
            raise ValueError(f"the sum of {entry} is another one")
    if read_record(path, "").get("sealed"):
        raise ValueError("the seal is broken")


def _digest(file: Any, length: int) -> bytes:
    """Of the next ``length`` bytes, as hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES // 2)
    while length > 0 and (block := file.read(min(BLOCK, length))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()


class _Nothing(dict[Any, Any]):
    """Stands for an object of a class that is not imported here."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __hash__(self) -> int:  # type: ignore[override]
        return 0


class _Plain(pickle.Unpickler):
    """Reads a pickle without importing or calling anything that it names."""

    def find_class(self, _: str, __: str) -> Any:
        return _Nothing

    def persistent_load(self, _: Any) -> Any:
        return _Nothing()
