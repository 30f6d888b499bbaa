"""The seal of a store: a checksum of everything in an HDF5 file except its large arrays.

It is checked before the HDF5 library opens the file, because the library can crash on a damaged header. The seal is in
the first 512 bytes, which HDF5 leaves to its users:

    64 characters   SHA-256 of the JSON text
    JSON text       format, version, size of the file, places [offset, bytes] of the large arrays, and `sha256` of
                    everything else from byte 512 on
    zeros
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO

SEAL_BYTES = 512
SIGNATURE = b"\x89HDF\r\n\x1a\n"
Places = Sequence[tuple[int, int]]


class Damaged(Exception):
    """The file does not match its seal; the message says why."""


def seal(path: Path, places: Places, **facts: object) -> None:
    """Writes the seal of a complete file.

    Args:
        path: of the file, whose first 512 bytes are free.
        places: [offset, bytes] of each large array, which the checksum leaves out.
        facts: other entries of the JSON text.
    """
    size = path.stat().st_size
    with open(path, "r+b") as file:
        rest = _digest(file, size, sorted(places))
        text = json.dumps({**facts, "size": size, "places": sorted(places), "sha256": rest}).encode()
        block = hashlib.sha256(text).hexdigest().encode() + text
        assert len(block) < SEAL_BYTES
        file.seek(0)
        file.write(block.ljust(SEAL_BYTES, b"\0"))


def check_seal(path: Path, **facts: object) -> None:
    """Compares a file with its seal.

    Raises:
        Damaged: the file has no seal, was changed outside its large arrays, or has other `facts`.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        block = file.read(SEAL_BYTES).rstrip(b"\0")
        digest, text = block[:64], block[64:]
        if hashlib.sha256(text).hexdigest().encode() != digest:
            raise Damaged("its first bytes are not those of a store")
        known = json.loads(text)
        for key, value in facts.items():
            if known.get(key) != value:
                raise Damaged(f"its {key} is {known.get(key)}, not {value}")
        if path.stat().st_size != known["size"]:
            raise Damaged(f"it has {path.stat().st_size} of {known['size']} bytes")
        if _digest(file, known["size"], known["places"]) != known["sha256"]:
            raise Damaged("the checksum of its header does not match")


def has_signature(path: Path) -> bool:
    """Whether a file is HDF5: its signature is at byte 0, 512, 1024, 2048, ...; does not use the HDF5 library."""
    size, at = path.stat().st_size, 0
    with open(path, "rb") as file:
        while at < size:
            file.seek(at)
            if file.read(len(SIGNATURE)) == SIGNATURE:
                return True
            at = max(SEAL_BYTES, 2 * at)
    return False


def _digest(file: IO[bytes], size: int, places: Places) -> str:
    digest, start = hashlib.sha256(), SEAL_BYTES
    for offset, length in [*places, (size, 0)]:
        file.seek(start)
        for at in range(start, offset, 1 << 20):
            digest.update(file.read(min(1 << 20, offset - at)))
        start = offset + length
    return digest.hexdigest()
