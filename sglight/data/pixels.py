"""Decodes picture files to pixels, as a viewer would show them.

Orientation tags are applied, transparent parts are drawn over white, and 16 bits per channel are scaled to 8. Pictures
that are ambiguous are refused: several frames, 32-bit or floating-point levels. So are those that are too large.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sglight.errors import UserError

RULES = "orientation tags applied; transparency over white; 16 bits a channel scaled to 8"
# Not all of Pillow's formats: some of its readers start other programs, or can read a size but no pixels.
FORMATS = (  # tried in this order
    "JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "DIB", "PCX", "QOI", "SGI", "TGA",
)  # fmt: skip
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
ORIENTATION = 0x0112  # the tag's number
LARGE = 4_000_000  # pixels; larger pictures are decoded one at a time, as each needs many times its size in memory
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_one_large = threading.Lock()


def suffixes() -> set[str]:
    """The file name extensions of the formats that are read, such as `.jpg`."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


@dataclass(frozen=True)
class Decoder:
    """Turns a file's bytes into pixels [C, H, W].

    Args:
        mode: Pillow's name of the colours, `RGB` or `L` (grey).
        size: the picture is scaled and cropped to size x size; None: it keeps its size.
        max_megapixels: larger pictures are refused before they are decoded.
    """

    mode: str
    size: int | None
    max_megapixels: float = 64.0

    def __call__(self, data: bytes) -> Pixels:
        """The pixels of a file with these bytes.

        Raises:
            UserError: the picture is refused or cannot be read; the message continues one that begins with its name.
        """
        try:
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                self._check(image)
                if image.format == "PNG":
                    _verify(data)
                if image.width * image.height <= LARGE:
                    return self._pixels(image)
                with _one_large:
                    return self._pixels(image)
        except UserError:
            raise
        except Image.DecompressionBombError as error:
            raise UserError(self._too_large()) from error
        except Exception as error:  # Pillow raises many kinds
            raise UserError(f"is no picture that can be read ({error}): mend or remove it") from error

    def _check(self, image: Image.Image) -> None:
        if image.width * image.height > self.max_megapixels * 1e6:
            raise UserError(self._too_large(f"{image.width} x {image.height} pixels, "))
        frames = (
            1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        )  # MPO: a camera's JPEG with its previews
        if frames > 1:
            raise UserError(f"has {frames} frames or pages: save each as a picture of its own, or remove it")
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise UserError(
                f"has {'floating-point' if image.mode == 'F' else '32-bit'} levels, whose black and white are not "
                "known: save it with 8 or 16 bits, or give the numbers as dataset=hdf5"
            )

    def _too_large(self, given: str = "") -> str:
        return f"has {given}more than dataset.max_megapixels={self.max_megapixels:g}: raise it, or scale the picture"

    def _pixels(self, image: Image.Image) -> Pixels:
        image.load()  # in some formats the tags come after the pixels
        picture = eight_bits(image)
        if picture.getexif().get(ORIENTATION, 1) != 1:
            picture = ImageOps.exif_transpose(picture)
        picture = over_white(picture).convert(self.mode)
        if self.size is not None:
            picture = ImageOps.fit(picture, (self.size, self.size))
        pixels = np.asarray(picture)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def eight_bits(image: Image.Image) -> Image.Image:
    """Scales a picture of 16-bit levels to 8 bits, where Pillow would clip them; returns others unchanged."""
    if image.mode != "I" and image.mode not in SIXTEEN_BITS:
        return image
    levels = np.asarray(image).astype(np.int64)
    clear = image.info.get("transparency")
    if clear is not None:  # the level that is transparent
        levels = np.where(levels == clear, 65535, levels)
    scaled = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    scaled.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return scaled


def over_white(image: Image.Image) -> Image.Image:
    """The picture drawn over white, if it has transparent parts."""
    if not image.has_transparency_data:
        return image
    drawing = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing)


def _verify(data: bytes) -> None:
    """Compares the checksums in a PNG file, which decoding ignores."""
    with Image.open(BytesIO(data), formats=("PNG",)) as image:
        image.verify()


@contextmanager
def pillow_limit(max_megapixels: float) -> Iterator[None]:
    """Context in which Pillow's own limit of a picture's size is at least ``max_megapixels``."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max(int(max_megapixels * 1e6), before or 0)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
