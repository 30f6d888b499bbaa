"""Pixels are what a person would see; what has no certain look is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from sglight.data.pixels import Decoder, suffixes
from sglight.errors import UserError

LEVELS = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(image, kind="PNG", mode="L", **options):
    return Decoder(mode, None)(encoded(image, kind, **options))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(kind):
    wide = LEVELS.astype(np.uint16) * 257
    assert np.array_equal(decode(Image.fromarray(wide), kind)[0], LEVELS)
    assert np.array_equal(decode(Image.fromarray(wide), kind, "RGB"), np.stack([LEVELS] * 3))


def test_16_bits_big_endian():
    wide = Image.frombytes("I;16B", (6, 4), (LEVELS.astype(">u2") * 257).tobytes())
    assert np.array_equal(decode(wide, "TIFF")[0], LEVELS)


@pytest.mark.parametrize("values", [LEVELS.astype(np.float32) / 255, LEVELS.astype(np.int32) * 9])
def test_levels_without_a_known_white_are_refused(values):
    with pytest.raises(UserError, match=r"whose black and white are not known: .* dataset=hdf5"):
        decode(Image.fromarray(values), "TIFF")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_over_white(mode):
    alpha = np.where(LEVELS < 100, 255, 0).astype(np.uint8)
    black = np.zeros_like(LEVELS)
    drawing = Image.fromarray(np.stack([*[black] * (3 if mode == "RGBA" else 1), alpha], -1), mode)
    for target in ("L", "RGB"):
        assert np.array_equal(decode(drawing, mode=target)[0], 255 - alpha)


def test_transparency_by_colour_and_of_palettes():
    grey = Image.fromarray(np.where(LEVELS < 100, 0, 50).astype(np.uint8))
    assert np.unique(decode(grey, transparency=0)[0]).tolist() == [50, 255]
    assert np.unique(decode(grey.convert("P"), transparency=0)[0]).tolist() == [50, 255]
    wide = Image.fromarray(np.where(LEVELS < 100, 0, 50 * 257).astype(np.uint16))
    assert np.unique(decode(wide, transparency=0)[0]).tolist() == [50, 255]


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = decode(Image.fromarray(LEVELS), exif=exif)[0]
    assert np.array_equal(turned, np.rot90(LEVELS, -1))
    wide = decode(Image.fromarray(LEVELS.astype(np.uint16) * 257), exif=exif)[0]
    assert np.array_equal(wide, turned)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_several_frames_are_refused(kind):
    first, second = Image.fromarray(LEVELS), Image.fromarray(255 - LEVELS)
    with pytest.raises(UserError, match="has 2 frames or pages: save each"):
        decode(first, kind, save_all=True, append_images=[second])


def test_a_camera_s_preview_is_no_second_frame():
    first, preview = Image.new("RGB", (6, 4), "red"), Image.new("RGB", (3, 2), "red")
    assert decode(first, "MPO", "RGB", save_all=True, append_images=[preview]).shape == (3, 4, 6)


def test_a_picture_above_the_limit_is_refused_before_it_is_decoded():
    data = encoded(Image.new("1", (3000, 2000)))
    with pytest.raises(UserError, match=r"3000 x 2000 pixels, more than dataset\.max_megapixels=5"):
        Decoder("L", None, 5)(data)
    assert Decoder("L", 2, 6)(data).shape == (1, 2, 2)


def test_a_flipped_bit_in_a_png_is_found():
    data = bytearray(encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8))))
    for at in range(40, len(data) - 12, 17):
        data[at] ^= 1
        with pytest.raises(UserError, match="is no picture that can be read"):
            Decoder("L", None)(bytes(data))
        data[at] ^= 1


def test_what_is_read():
    assert {".jfif", ".jpg", ".png", ".tif", ".webp", ".bmp", ".gif", ".ppm"} <= suffixes()
    assert not {".eps", ".h5", ".txt", ".mpg"} & suffixes()
