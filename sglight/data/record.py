"""The checksum of a user's file, kept from run to run so that a change of the file is noticed."""

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from sglight.files import write_atomically


@dataclass(frozen=True)
class Record:
    """The state of a file at a date."""

    size: int
    mtime_ns: int
    sha256: str
    date: str

    @classmethod
    def of(cls, path: Path) -> "Record":
        """The present state of a file; reads all of it."""
        status = path.stat()
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(status.st_size, status.st_mtime_ns, digest, f"{datetime.now():%Y-%m-%d %H:%M}")

    @classmethod
    def load(cls, path: Path) -> "Record | None":
        """The record that `save` wrote; None if there is none, or something else."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, path: Path) -> None:
        """Writes the record as JSON."""
        write_atomically(path, json.dumps(asdict(self)))

    def is_decay_of(self, other: "Record") -> bool:
        """Whether the contents differ although size and time of the last change are the same: a damaged file."""
        return self.sha256 != other.sha256 and (self.size, self.mtime_ns) == (other.size, other.mtime_ns)
