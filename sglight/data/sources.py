"""The members of a folder, a zip file or a tar file, in order, each with a function that reads it.

Links are followed, but not in loops. An archive is read to its end, so that its checksums are checked.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

from sglight.errors import UserError

OPENERS: tuple[tuple[bytes, Callable[..., Any]], ...] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)
BAD_HEADERS = (  # InvalidHeaderError at the start of a file means another compression, or no archive
    tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
    tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
    tarfile.InvalidHeaderError,  # type: ignore[attr-defined]
)
DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError, ValueError,
)  # fmt: skip
SHOWN = 200  # characters of a name in a message


@dataclass(frozen=True)
class Member:
    """A file, folder or link.

    Attributes:
        name: its path below the source, with slashes.
        read: returns its bytes, until the next member is asked for; None if it has none.
        size: the number of its bytes.
        target: for a link in an archive, the name of the member to which it leads.
        folder: whether it is a folder.
        lost: why it cannot be read; None if it can.
        stamp: for a file in a folder, a text that changes when the file does.
    """

    name: str
    read: Callable[[], bytes] | None = None
    size: int = 0
    target: str | None = None
    folder: bool = False
    lost: str | None = None
    stamp: str = ""


class Source:
    """The folder, zip or tar file at `path`, given by the config key `key`; iterating yields its members.

    Raises:
        UserError: from every method, if it cannot be read or is damaged; the message names the key.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def __str__(self) -> str:
        return f"{self.key}={printable(str(self.path))}"

    def __iter__(self) -> Iterator[Member]:
        with self._explained():
            if self.path.is_dir():
                yield from _walk(self.path, "", ())
            elif _is_zip(self.path):
                yield from _zip_members(self.path)
            else:
                yield from _tar_members(self.path)

    def read(self, member: Member) -> bytes:
        """The bytes of a member whose ``read`` is not None."""
        assert member.read is not None
        with self._explained(member.name):
            return member.read()

    def fingerprint(self) -> str:
        """A text that changes when a file is added, removed, resized or modified, also behind a link."""
        with self._explained():
            if not self.path.is_dir():
                return _stamp(os.stat(self.path))
            digest = hashlib.sha256()
            for member in _walk(self.path, "", ()):
                digest.update(f"{member.name}:{member.stamp};".encode(errors="surrogateescape"))
            return digest.hexdigest()

    @contextmanager
    def _explained(self, name: str = "") -> Iterator[None]:
        where = f": {printable(name)}" if name else ""
        try:
            yield
        except UserError:
            raise
        except DAMAGE as error:
            raise UserError(
                f"{self}{where} is truncated, damaged or no tar or zip archive ({error}): fetch or pack it anew"
            ) from error
        except (RuntimeError, NotImplementedError) as error:  # encrypted, or packed by a method of its own
            raise UserError(
                f"{self}{where} cannot be unpacked ({error}): pack it anew, as deflated zip or tar"
            ) from error
        except OSError as error:
            raise UserError(
                f"{self}{where} cannot be read ({error}): see its permissions and its disk"
            ) from error


def printable(name: str) -> str:
    """The name of a file with everything escaped that a terminal cannot print or would take for a new line."""
    text = name.encode(errors="backslashreplace").decode()
    text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}"


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[Member]:
    """The files of a folder, sorted by name, then those of its folders; `above` has all folders that lead here."""
    status = os.stat(folder)
    above = (*above, (status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    below: list[tuple[Path, str]] = []
    for entry in found:
        name, path = f"{prefix}{entry.name}", Path(entry.path)
        try:
            status = entry.stat()
        except OSError as error:  # a broken link is reported as lost; anything else is an error
            if not entry.is_symlink():
                raise
            yield Member(name, lost=f"links that cannot be followed ({error.strerror})", stamp="lost")
            continue
        if stat.S_ISDIR(status.st_mode):
            if (status.st_dev, status.st_ino) in above:
                yield Member(name, lost="links to a folder that they are in", folder=True, stamp="loop")
            else:
                yield Member(name, folder=True)
                below.append((path, f"{name}/"))
        elif stat.S_ISREG(status.st_mode):
            yield Member(name, path.read_bytes, status.st_size, stamp=_stamp(status))
        else:
            yield Member(name, lost="sockets, pipes and devices", stamp="special")
    for path, name in below:
        yield from _walk(path, name, above)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.read(2) == b"PK":
            return True
    return zipfile.is_zipfile(path) and not tarfile.is_tarfile(path)  # a tar file may end with a zip file


def _zip_members(path: Path) -> Iterator[Member]:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        # Some programs write the separators of Windows.
        windows = not any("/" in info.filename for info in infos)
        for info in infos:
            name = info.filename.replace("\\", "/") if windows else info.filename
            if name.endswith("/"):
                yield Member(name.rstrip("/"), folder=True)
            elif stat.S_ISLNK(info.external_attr >> 16):
                target = archive.read(info).decode(errors="surrogateescape")
                yield Member(name, target=_joined(name, target))
            else:
                yield Member(name, partial(archive.read, info), info.file_size)


class StrictTarInfo(tarfile.TarInfo):
    """Raises an error for a missing end mark or a damaged header, which tarfile takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """The next header; tarfile calls it."""
        try:
            return super().fromtarfile(archive)
        except BAD_HEADERS as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


def _tar_members(path: Path) -> Iterator[Member]:
    with open(path, "rb") as file:
        magic = file.read(6)
    opener: Callable[..., Any] = next((opener for start, opener in OPENERS if magic.startswith(start)), open)
    # Not tarfile's own decompression, which ignores checksums.
    with (
        opener(path, "rb") as stream,
        tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as archive,
    ):
        for info in archive:
            name = info.name.removeprefix("./")
            if info.isdir():
                yield Member(name, folder=True)
            elif info.islnk():
                yield Member(name, target=_joined("", info.linkname))
            elif info.issym():
                yield Member(name, target=_joined(name, info.linkname))
            elif info.isreg():
                yield Member(name, partial(_tar_read, archive, info), info.size)
            else:
                yield Member(name, lost="sockets, pipes and devices")
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header in memory
        _read_to_end(archive, stream)


def _read_to_end(archive: tarfile.TarFile, stream: IO[bytes]) -> None:
    """Reads what follows the end mark, which must be zeros: a compressed stream has its checksum at its end."""
    rest: Any = archive.fileobj
    for file in (rest, stream):
        while block := file.read(1 << 20):
            if block.count(0) != len(block):
                raise tarfile.ReadError("it goes on after an end mark; tar --ignore-zeros reads on")


def _tar_read(archive: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(info)
    assert file is not None
    return file.read()


def _joined(name: str, target: str) -> str:
    """The name of the member to which a link at `name` with that target leads."""
    path = os.path.normpath(os.path.join(os.path.dirname(name), target))
    return path.replace(os.sep, "/")
