"""The data set `image_folder`: the user's own pictures, `train/<class>/*` and `test/<class>/*`."""

import json
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sglight import units
from sglight.config.datasets import ONE_SOURCE, at_least
from sglight.data.images import StoreData, short_hash
from sglight.data.layout import Layout, Picture, lay_out
from sglight.data.making import ensure
from sglight.data.pixels import RULES, Decoder, Pixels, pillow_limit
from sglight.data.sources import Source, printable
from sglight.data.store import Writer
from sglight.errors import UserError

THREADS = min(4, os.cpu_count() or 1)
AT_ONCE = 256  # at most so many pictures are decoded ahead of the one that is written,
BYTES_AT_ONCE = 32 << 20  # and at most so many bytes of files, or of pixels
FILE_BYTES_PER_PIXEL = 8  # a file with more bytes for each pixel is refused
IMPORT = "2"  # version of the conversion: raised when the same files would give other pixels


class ImageFolderData(StoreData):
    """The user's own pictures in class folders; the classes are the names of the folders, sorted.

    Args:
        name: the beginning of the file name of the store.
        data_dir: the folder of the store, the HDF5 file to which the pictures are converted once.
        raw_dir: the folder that holds `train` and perhaps `val` and `test`; or else
        archive: a tar or zip file of such a folder, which is read without unpacking it.
        size: every picture is scaled and cropped to size x size; None: they must all be of one size.
        channels: 3 for colour, 1 for grey.
        max_megapixels: larger pictures are refused.
        keys: those of `StoreData`.
    """

    def __init__(
        self,
        data_dir: str,
        name: str = "image_folder",
        raw_dir: str | None = None,
        archive: str | None = None,
        size: int | None = None,
        channels: int = 3,
        max_megapixels: float = 64.0,
        **keys: Any,
    ) -> None:
        super().__init__(name, data_dir, **keys)
        if channels not in (1, 3):
            raise UserError(f"dataset.channels={channels} must be 3 (colour) or 1 (grey)")
        if size is not None:
            at_least("dataset.size", size, 1)
        if not max_megapixels > 0:
            raise UserError(f"dataset.max_megapixels={max_megapixels} must be above 0")
        if size is not None and size**2 > max_megapixels * 1e6:
            raise UserError(
                f"dataset.size={size} makes pictures of more than dataset.max_megapixels={max_megapixels:g}: lower it"
            )
        if (raw_dir is None) == (archive is None):
            raise UserError(ONE_SOURCE)
        key = "dataset.raw_dir" if archive is None else "dataset.archive"
        self.source = Source(Path(raw_dir or archive or "").expanduser().resolve(), key)
        self.decoder = Decoder("RGB" if channels == 3 else "L", size, max_megapixels)
        self.origin = str(self.source)

    @property
    def store_path(self) -> Path:
        """The store; its name depends on the source and on how pictures are converted."""
        identity = f"{self.source.path}|{self.decoder.mode}|{self.decoder.size}"
        return self.data_dir / f"{self.name}-{short_hash(identity)}.h5"

    def prepare_data(self) -> None:
        """Makes the store, unless it is there."""
        self._check_source()
        ensure(self.store_path, f"{IMPORT}:{self.source.fingerprint()}", self._fill)

    def _check_source(self) -> None:
        key, path = self.source.key, self.source.path
        if not path.exists():
            raise UserError(f"{self.source} does not exist")
        if path.is_dir() and key == "dataset.archive":
            raise UserError(f"{self.source} is a folder: give it as dataset.raw_dir")
        if not path.is_dir() and key == "dataset.raw_dir":
            raise UserError(f"{self.source} is a file: give it as dataset.archive")

    def _fill(self, writer: Writer) -> None:
        with pillow_limit(self.decoder.max_megapixels):
            layout = lay_out(self.source, self.source)
            pictures: dict[int, list[Picture]] = defaultdict(list)
            for picture in layout.pictures:
                pictures[picture.member].append(picture)
            row_of: dict[Picture, int] = {}
            shape: tuple[int, ...] = ()
            for places, pixels in self._decoded(pictures):
                if not shape:
                    shape = pixels.shape
                    row_of = self._create(writer, layout, shape)
                for picture in places:
                    self._check_shape(picture, pixels.shape, shape)
                    writer.write(picture.split, row_of[picture], pixels[None])
        writer.finish(
            layout.classes,
            name=self.name,
            source=printable(str(self.source.path)),
            pixels=RULES,
            summary=layout.summary(),
            ignored=json.dumps(layout.ignored),
        )

    def _decoded(self, pictures: dict[int, list[Picture]]) -> Iterator[tuple[list[Picture], Pixels]]:
        """The pixels of all pictures in the order of the source; threads decode ahead, within the limits above."""
        waiting: deque[tuple[list[Picture], int, Future[Pixels]]] = deque()
        file_bytes = 0  # of the files in `waiting`
        pixel_bytes = 0  # of one picture, once the first is decoded
        with ThreadPoolExecutor(THREADS) as pool:
            for places, data in self._files(pictures):
                waiting.append((places, len(data), pool.submit(self._decode, places[0], data)))
                file_bytes += len(data)
                if not (
                    not pixel_bytes
                    or len(waiting) > AT_ONCE
                    or file_bytes > BYTES_AT_ONCE
                    or len(waiting) * pixel_bytes > BYTES_AT_ONCE
                ):
                    continue
                # Half of them at once: waiting for each picture in turn takes a sixth more CPU time (CIFAR-10).
                for _ in range(-(-len(waiting) // 2)):
                    places, size, future = waiting.popleft()
                    file_bytes, pixel_bytes = file_bytes - size, future.result().nbytes
                    yield places, future.result()
            for places, _, future in waiting:
                yield places, future.result()

    def _files(self, pictures: dict[int, list[Picture]]) -> Iterator[tuple[list[Picture], bytes]]:
        """The bytes of each member that holds pictures, with those pictures."""
        limit = FILE_BYTES_PER_PIXEL * self.decoder.max_megapixels * 1e6 + (1 << 20)
        seen = 0
        for number, member in enumerate(self.source):
            if number not in pictures:
                continue
            if member.read is None:
                break
            seen += 1
            if member.size > limit:
                raise self._error(
                    member.name,
                    f"has {units.size(member.size)}, more than a picture of dataset.max_megapixels="
                    f"{self.decoder.max_megapixels:g} can have: remove it, or raise that",
                )
            yield pictures[number], self.source.read(member)
        if seen < len(pictures):
            raise UserError(f"{self.source} was changed while it was read: start again when it is complete")

    def _create(self, writer: Writer, layout: Layout, shape: tuple[int, ...]) -> dict[Picture, int]:
        """Makes room in the store; returns the row of each picture.

        Rows are in random order. In the order of the folders a chunk that is streamed would hold few classes only.
        """
        number = {label: index for index, label in enumerate(layout.classes)}
        rows: dict[Picture, int] = {}
        for split in ("train", "val", "test"):
            chosen = [picture for picture in layout.pictures if picture.split == split]
            if not chosen:
                continue
            labels = np.array([number[picture.label] for picture in chosen])
            places = np.random.default_rng(0).permutation(len(labels))
            shuffled = np.empty_like(labels)
            shuffled[places] = labels
            writer.create(split, shuffled, shape)
            rows |= zip(chosen, places.tolist(), strict=True)
        return rows

    def _decode(self, picture: Picture, data: bytes) -> Pixels:
        try:
            return self.decoder(data)
        except UserError as error:
            raise self._error(picture.name, str(error)) from error.__cause__

    def _error(self, name: str, reason: str) -> UserError:
        return UserError(f"{self.source}: {printable(name)} {reason}")

    def _check_shape(self, picture: Picture, given: Iterable[int], wanted: Iterable[int]) -> None:
        (_, height, width), (_, first_height, first_width) = given, wanted
        if (height, width) != (first_height, first_width):
            raise self._error(
                picture.name,
                f"has {width} x {height} pixels, the first picture {first_width} x {first_height}: "
                "set dataset.size to bring all to one size",
            )
