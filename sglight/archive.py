"""Seals checkpoint files, so that any damage is found, and reads the plain values in them; imports no torch.

A checkpoint is a ZIP archive. Its seal is a hash of the whole file, written into the comment of the archive.
"""

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
END = b"PK\x05\x06"  # the beginning of the last 22 bytes of a ZIP archive; their last two are the length of a comment
END_BYTES = 22
BLOCK = 1 << 20
RECORD = "run"  # the key in a checkpoint for what `sglight.callbacks.record` writes about the run
DATA = "sglight_data"  # the key for what `sglight.strategies.contents` writes about the data
DAMAGES = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, RecursionError, MemoryError,
    struct.error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


def seal(path: Path) -> None:
    """Append the seal to a file: a hash of its contents, as the comment of the ZIP archive."""
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
    """Refuse a file that is no checkpoint, or is damaged.

    Args:
        path: of the file.
        name: of the file in the message, such as ``ckpt=PATH``.

    Raises:
        UserError: for any damage.
    """
    try:
        if not _is_sealed(path):
            _check_sums(path)
    except DAMAGES as error:
        raise damaged(name) from error


def read_plain(path: Path, name: str) -> dict[str, Any]:
    """The contents of a checkpoint as far as they are plain values; other objects become empty dictionaries.

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
    """What `sglight.callbacks.record` wrote into a checkpoint about its run; empty if it did not.

    The entry ``data`` has the facts about the data and their fingerprint.
    """
    content = read_plain(path, name)
    record = content.get(RECORD)
    if not isinstance(record, dict):
        return {}
    _rename(record)
    data = [part for part in (content.get(DATA), record.get("data")) if isinstance(part, dict)]
    return {**record, "data": {k: v for part in data for k, v in part.items()}} if data else record


def _rename(record: dict[str, Any]) -> None:
    """Give keys of earlier versions, in the config of a record, their present names."""
    node: Any = record
    for key in ("config", "strategy", "estimator"):
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, dict) and "residual" in node:
        node["form"] = "residual" if node.pop("residual") else "direct"


def damaged(name: str) -> UserError:
    """The error about a file that cannot be used."""
    return UserError(
        f"{name} is damaged, or not a checkpoint of sglight; give another, such as best.ckpt or last.ckpt beside it"
    )


def _is_sealed(path: Path) -> bool:
    """Whether a file has a seal; raises a ValueError if it does not match."""
    length = path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        file.seek(max(length - len(MARK), 0))
        if file.read(len(MARK)) != MARK:
            return False
        expected = file.read()
        file.seek(0)
        if _digest(file, length) != expected:
            raise ValueError("the digest does not match")
    return True


def _check_sums(path: Path) -> None:
    """Check the archive's own checksums, for a checkpoint without a seal."""
    with zipfile.ZipFile(path) as archive:
        if (entry := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {entry} does not match")
    if read_record(path, "").get("sealed"):
        raise ValueError("the seal is missing")


def _digest(file: Any, length: int) -> bytes:
    """The hash of the next ``length`` bytes of a file, as hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES // 2)
    while length > 0 and (block := file.read(min(BLOCK, length))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()


class _Nothing(dict[Any, Any]):
    """Takes the place of an object whose class is not imported."""

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
