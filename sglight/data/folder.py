"""The user's own pictures, `train/<class>/*` and `test/<class>/*`, in a folder or an archive of it."""

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
from PIL import Image, ImageOps

from sglight.data.images import StoreData, folder_fingerprint, short_hash
from sglight.data.schema import at_least
from sglight.data.store import SPLITS, Writer, ensure
from sglight.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp"}
AT_ONCE = 256
MISSING_END = (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]
Read = Callable[[], bytes]


@dataclass(frozen=True)
class Picture:
    """A file that counts: its name, split and class."""

    name: str
    split: str
    label: str


@dataclass(frozen=True)
class Decoder:
    """Turns a file's bytes into pixels [C, H, W]."""

    mode: str
    size: int | None

    def __call__(self, data: bytes) -> np.ndarray[Any, Any]:
        with Image.open(BytesIO(data)) as image:
            picture: Image.Image = image.convert(self.mode)
        if self.size is not None:
            picture = ImageOps.fit(picture, (self.size, self.size))
        pixels = np.asarray(picture)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class ImageFolderData(StoreData):
    """The user's own pictures; the classes are the folders' names, sorted.

    Args:
        name: begins the store's file name.
        data_dir: the store's folder.
        raw_dir: the folder that holds `train` and `test`, or
        archive: a tar or zip file of it; it is read as a stream, nothing is unpacked.
        size: every picture is scaled and cropped to size x size; None: they are of one size.
        channels: 3 colour, 1 grey.
        keys: those of `SampleData`.
    """

    def __init__(
        self,
        data_dir: str,
        name: str = "image_folder",
        raw_dir: str | None = None,
        archive: str | None = None,
        size: int | None = None,
        channels: int = 3,
        **keys: Any,
    ) -> None:
        super().__init__(name, data_dir, **keys)
        if channels not in (1, 3):
            raise UserError(f"dataset.channels={channels} must be 3 (colour) or 1 (grey)")
        if size is not None:
            at_least("dataset.size", size, 1)
        if (raw_dir is None) == (archive is None):
            raise UserError(
                "dataset=image_folder needs either dataset.raw_dir (the folder that holds train/ and test/) "
                "or dataset.archive (a tar or zip file of it)"
            )
        self.key = "dataset.raw_dir" if archive is None else "dataset.archive"
        self.source = Path(raw_dir or archive or "").expanduser().resolve()
        self.decoder = Decoder("RGB" if channels == 3 else "L", size)

    @property
    def store_path(self) -> Path:
        """A name that depends on the source and on what is made of it."""
        identity = f"{self.source}|{self.decoder.mode}|{self.decoder.size}"
        return self.data_dir / f"{self.name}-{short_hash(identity)}.h5"

    def prepare_data(self) -> None:
        """Makes the store."""
        self._check_source()
        if self.source.is_dir():
            fingerprint = folder_fingerprint(self.source)
        else:
            status = os.stat(self.source)
            fingerprint = f"{status.st_size}:{status.st_mtime_ns}"
        ensure(self.store_path, fingerprint, self._fill)

    def _check_source(self) -> None:
        if not self.source.exists():
            raise UserError(f"{self.key}={self.source} does not exist")
        if self.source.is_dir() and self.key == "dataset.archive":
            raise UserError(f"dataset.archive={self.source} is a folder: give it as dataset.raw_dir")
        if not self.source.is_dir() and self.key == "dataset.raw_dir":
            raise UserError(f"dataset.raw_dir={self.source} is a file: give it as dataset.archive")

    def _fill(self, writer: Writer) -> None:
        pictures, shape = self._survey()
        classes = sorted({picture.label for picture in pictures if picture.split == "train"})
        rows = self._create(writer, pictures, classes, shape)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            pairs = zip(self._pictures(), rows, strict=True)
            while group := [(picture, read(), row) for (picture, read), row in islice(pairs, AT_ONCE)]:
                pixels = pool.map(lambda file: self._decode(file[0], file[1], shape), group)
                for (picture, _, row), image in zip(group, pixels, strict=True):
                    writer.write(picture.split, row, image[None])
        writer.finish(classes, name=self.name, source=str(self.source))

    def _survey(self) -> tuple[list[Picture], tuple[int, ...]]:
        """All pictures in the order of the source, and the shape of the first."""
        pictures: list[Picture] = []
        shape: tuple[int, ...] = ()
        for picture, read in self._pictures():
            shape = shape or self._decode(picture, read(), ()).shape
            pictures.append(picture)
        found = {split: {picture.label for picture in pictures if picture.split == split} for split in SPLITS}
        for split in SPLITS:
            if not found[split]:
                raise UserError(f"{self.key}={self.source} has no pictures {split}/<class>/*")
        if foreign := found["test"] - found["train"]:
            raise UserError(f"{self.key}={self.source}: class {min(foreign)} is in test/ but not in train/")
        return pictures, shape

    def _create(
        self, writer: Writer, pictures: list[Picture], classes: list[str], shape: tuple[int, ...]
    ) -> list[int]:
        """Makes room in the store; returns the row of each picture.

        The pictures are shuffled: sorted by class, as folders are, a streamed chunk would be of few classes.
        """
        number = {label: index for index, label in enumerate(classes)}
        rows: dict[str, Iterator[int]] = {}
        for split in SPLITS:
            labels = np.array([number[picture.label] for picture in pictures if picture.split == split])
            places = np.random.default_rng(0).permutation(len(labels))
            shuffled = np.empty_like(labels)
            shuffled[places] = labels
            writer.create(split, shuffled, shape)
            rows[split] = iter(places.tolist())
        return [next(rows[picture.split]) for picture in pictures]

    def _decode(self, picture: Picture, data: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        try:
            pixels = self.decoder(data)
        except Exception as error:  # Pillow raises many kinds
            raise UserError(
                f"{picture.name} in {self.source} is no picture that can be read: mend or remove it"
            ) from error
        if shape and pixels.shape != shape:
            (height, width), (first_height, first_width) = pixels.shape[1:], shape[1:]
            raise UserError(
                f"{picture.name} in {self.source} has {width} x {height} pixels, the first picture "
                f"{first_width} x {first_height}: set dataset.size to bring all to one size"
            )
        return pixels

    def _pictures(self) -> Iterator[tuple[Picture, Read]]:
        try:
            for name, read in members(self.source):
                picture = classified(name)
                if picture is not None:
                    yield picture, read
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(
                f"{self.key}={self.source} is truncated, damaged or no tar or zip archive ({error})"
            ) from error


def classified(name: str) -> Picture | None:
    """The picture behind a file's name .../train/<class>/<file>; None for files that do not count."""
    path = PurePosixPath(name)
    if len(path.parts) < 3 or path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
        return None
    split, label = path.parts[-3:-1]
    if split not in SPLITS or "__MACOSX" in path.parts:
        return None
    return Picture(name, split, label)


class StrictTarInfo(tarfile.TarInfo):
    """Misses the end mark of an archive: without it, tarfile takes a truncated one for a short one."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """The next header."""
        try:
            return super().fromtarfile(archive)
        except MISSING_END as error:
            raise tarfile.ReadError("unexpected end of data") from error


def members(source: Path) -> Iterator[tuple[str, Read]]:
    """Name and reader of each regular file; the reader works until the next one is asked for."""
    if source.is_dir():
        yield from _folder_members(source)
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                yield info.filename, partial(archive.read, info)
    else:
        with tarfile.open(source, "r|*", tarinfo=StrictTarInfo) as archive:
            for member in archive:
                if member.isreg():
                    yield member.name, partial(_tar_read, archive, member)
                archive.members.clear()  # type: ignore[attr-defined]  # would hold on to every header


def _folder_members(source: Path) -> Iterator[tuple[str, Read]]:
    for parent, folders, files in os.walk(source, followlinks=True):
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            yield path.relative_to(source).as_posix(), path.read_bytes


def _tar_read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None
    return file.read()
