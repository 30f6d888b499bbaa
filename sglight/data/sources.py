"""One walk through a folder, a zip or a tar file: its members in order, each with its reader.

It serves the reading and the fingerprint, follows links, ends in loops of them, and reads an archive to its end.
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
BAD_HEADERS = (  # the last of them at the start of a file means another compression or no archive
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
        read: its bytes; works until the next member is asked for. None: it has none.
        size: of its bytes.
        target: the name of the member of the archive that a link stands for.
        folder: whether it is one.
        lost: why a file of that name cannot be read; None: it can.
        stamp: changes when a file of a folder is changed.
    """

    name: str
    read: Callable[[], bytes] | None = None
    size: int = 0
    target: str | None = None
    folder: bool = False
    lost: str | None = None
    stamp: str = ""


class Source:
    """The folder, zip or tar file at `path`, which the config's `key` names.

    Raises:
        UserError: from every method: it cannot be read, or is damaged; the text names the key.
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
        """The bytes of a member that has some."""
        assert member.read is not None
        with self._explained(member.name):
            return member.read()

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, resized or touched, also behind a link."""
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
    """A file's name without what a terminal cannot print or would take for a new line."""
    text = name.encode(errors="backslashreplace").decode()
    text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}"


def _walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[Member]:
    """The files of a folder, then what its folders hold, each by name; `above` are the folders that lead here."""
    status = os.stat(folder)
    above = (*above, (status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    below: list[tuple[Path, str]] = []
    for entry in found:
        name, path = f"{prefix}{entry.name}", Path(entry.path)
        try:
            status = entry.stat()
        except OSError as error:  # whatever it leads to; what cannot be read elsewhere is an error
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
        # Some programs for Windows wrote its separators.
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
    """Takes a missing end mark or a damaged header for an error; tarfile takes them for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """The next header."""
        try:
            return super().fromtarfile(archive)
        except BAD_HEADERS as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


def _tar_members(path: Path) -> Iterator[Member]:
    with open(path, "rb") as file:
        magic = file.read(6)
    opener: Callable[..., Any] = next((opener for start, opener in OPENERS if magic.startswith(start)), open)
    # Not tarfile's own unpacking, which passes over the checksums.
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
            archive.members.clear()  # type: ignore[attr-defined]  # would hold on to every header
        _read_to_end(archive, stream)


def _read_to_end(archive: tarfile.TarFile, stream: IO[bytes]) -> None:
    """What follows the end mark must be zeros; a compressed stream has its checksum at its end."""
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
    """The name in the archive of what a link at `name` leads to."""
    path = os.path.normpath(os.path.join(os.path.dirname(name), target))
    return path.replace(os.sep, "/")
