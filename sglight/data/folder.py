"""The user's own pictures, `train/<class>/*` and `test/<class>/*`, in a folder or an archive of it."""

import json
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sglight.config.datasets import at_least
from sglight.data.images import StoreData, short_hash
from sglight.data.layout import Layout, Picture, lay_out
from sglight.data.making import ensure
from sglight.data.pixels import RULES, Decoder, Pixels, pillow_limit
from sglight.data.sources import Source, printable
from sglight.data.store import Writer
from sglight.errors import UserError

THREADS = min(4, os.cpu_count() or 1)
AT_ONCE = 256  # pictures that are decoded ahead of the one that is written ...
BYTES_AT_ONCE = 32 << 20  # ... unless their files, or their pixels, are more than this
FILE_BYTES_PER_PIXEL = 8  # a file that is larger than its pixels can be is not read
IMPORT = "2"  # changes when the same files give other pixels


class ImageFolderData(StoreData):
    """The user's own pictures; the classes are the folders' names, sorted.

    Args:
        name: begins the store's file name.
        data_dir: the store's folder.
        raw_dir: the folder that holds `train` and perhaps `val` and `test`, or
        archive: a tar or zip file of it; it is read as a stream, nothing is unpacked.
        size: every picture is scaled and cropped to size x size; None: they are of one size.
        channels: 3 colour, 1 grey.
        max_megapixels: a picture with more is refused.
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
            raise UserError(
                "dataset=image_folder needs either dataset.raw_dir (the folder that holds train/ and test/) "
                "or dataset.archive (a tar or zip file of it)"
            )
        key = "dataset.raw_dir" if archive is None else "dataset.archive"
        self.source = Source(Path(raw_dir or archive or "").expanduser().resolve(), key)
        self.decoder = Decoder("RGB" if channels == 3 else "L", size, max_megapixels)
        self.origin = str(self.source)

    @property
    def store_path(self) -> Path:
        """A name that depends on the source and on what is made of it."""
        identity = f"{self.source.path}|{self.decoder.mode}|{self.decoder.size}"
        return self.data_dir / f"{self.name}-{short_hash(identity)}.h5"

    def prepare_data(self) -> None:
        """Makes the store."""
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
        """All pictures in the order of the source, decoded ahead by threads as far as memory allows."""
        waiting: deque[tuple[list[Picture], int, Future[Pixels]]] = deque()
        held, each = 0, 0
        with ThreadPoolExecutor(THREADS) as pool:
            for places, data in self._files(pictures):
                waiting.append((places, len(data), pool.submit(self._decode, places[0], data)))
                held += len(data)
                if not (
                    not each
                    or len(waiting) > AT_ONCE
                    or held > BYTES_AT_ONCE
                    or len(waiting) * each > BYTES_AT_ONCE
                ):
                    continue
                # Half of them at once: to be woken for each picture in turn takes a sixth more CPU time (CIFAR-10).
                for _ in range(-(-len(waiting) // 2)):
                    places, size, future = waiting.popleft()
                    held, each = held - size, future.result().nbytes
                    yield places, future.result()
            for places, _, future in waiting:
                yield places, future.result()

    def _files(self, pictures: dict[int, list[Picture]]) -> Iterator[tuple[list[Picture], bytes]]:
        """The bytes of each member that is a picture, and of which ones."""
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
                    f"has {member.size / 1e6:.0f} MB, more than a picture of dataset.max_megapixels="
                    f"{self.decoder.max_megapixels:g} can have: remove it, or raise that",
                )
            yield pictures[number], self.source.read(member)
        if seen < len(pictures):
            raise UserError(f"{self.source} was changed while it was read: start again when it is complete")

    def _create(self, writer: Writer, layout: Layout, shape: tuple[int, ...]) -> dict[Picture, int]:
        """Makes room in the store; returns the row of each picture.

        The pictures are shuffled: sorted by class, as folders are, a streamed chunk would be of few classes.
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
