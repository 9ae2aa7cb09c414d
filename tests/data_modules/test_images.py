"""Pictures of every kind come in as RGB the right way up, and each way of being broken has its own reason."""

import io
import struct
import zlib
from functools import lru_cache

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_modules.buckets import SizeMapping, resize_to
from data_modules.images import Rejected, read_picture, training_picture

GRADIENT = np.stack(np.meshgrid(np.arange(0, 240, 6), np.arange(0, 200, 4)), -1).astype(np.uint8)  # (50, 40, 2)
RGB = np.concatenate([GRADIENT, 255 - GRADIENT[..., :1]], -1)


def encoded(picture: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("form", "name", "options"),
    [
        ("PNG", "a.png", {}),
        ("BMP", "a.bmp", {}),
        ("TIFF", "a.tiff", {}),
        ("WEBP", "a.webp", {"lossless": True}),
        ("PPM", "a.ppm", {}),
        ("PNG", "without_an_ending", {}),
    ],
)
def test_lossless_formats_come_in_as_they_were(form, name, options):
    assert np.array_equal(read_picture(encoded(Image.fromarray(RGB), form, **options), name), RGB)


@pytest.mark.parametrize(("form", "name"), [("JPEG", "a.JPG"), ("GIF", "a.gif"), ("WEBP", "a.webp")])
def test_lossy_formats_come_in_nearly(form, name):
    picture = read_picture(encoded(Image.fromarray(RGB), form), name)
    assert picture.shape == RGB.shape and np.abs(picture.astype(int) - RGB).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(orientation):
    """Against the definition: row 0 and column 0 of the stored picture lie at these sides of the one to be seen."""
    rows, columns = [
        ("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left"),
        ("left", "top"), ("right", "top"), ("right", "bottom"), ("left", "bottom"),
    ][orientation - 1]  # fmt: skip
    seen = RGB
    stored = seen if rows in ("top", "bottom") else seen.swapaxes(0, 1)
    stored = stored[::-1] if rows in ("bottom", "right") else stored
    stored = stored[:, ::-1] if columns in ("bottom", "right") else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(read_picture(content, "a.png"), seen)


def test_transparent_pictures_lie_on_white():
    alpha = np.zeros((50, 40, 1), np.uint8)
    alpha[:25] = 255
    alpha[25] = 51  # a fifth
    picture = read_picture(encoded(Image.fromarray(np.concatenate([RGB, alpha], -1)), "PNG"), "a.png")
    assert np.array_equal(picture[:25], RGB[:25]) and (picture[26:] == 255).all()
    assert np.abs(picture[25] - (RGB[25] * 0.2 + 255 * 0.8)).max() <= 1
    gray = Image.fromarray(np.concatenate([GRADIENT[..., :1], alpha], -1), "LA")
    assert (read_picture(encoded(gray, "PNG"), "a.png")[26:] == 255).all()
    palette = Image.fromarray(RGB).quantize(8)
    first = int(np.asarray(palette)[0, 0])
    picture = read_picture(encoded(palette, "PNG", transparency=first), "a.png")
    assert ((picture == 255).all(-1) == (np.asarray(palette) == first)).all()


def test_sixteen_bits_are_scaled_and_not_cut_off():
    levels = np.linspace(0, 65535, 2000).reshape(50, 40).astype(np.uint16)
    for form, name in (("PNG", "a.png"), ("TIFF", "a.tif")):
        picture = read_picture(encoded(Image.fromarray(levels), form), name)
        assert picture.shape == (50, 40, 3)
        assert np.abs(picture - (levels / 257)[..., None]).max() <= 0.5


def test_other_modes_become_rgb():
    cmyk = Image.fromarray(RGB).convert("CMYK")
    for form, name in (("TIFF", "a.tif"), ("JPEG", "a.jpg")):
        picture = read_picture(encoded(cmyk, form), name)
        assert np.abs(picture.astype(int) - RGB).mean() < 4
    black_and_white = Image.fromarray(RGB).convert("1")
    assert set(np.unique(read_picture(encoded(black_and_white, "PNG"), "a.png"))) <= {0, 255}
    assert (
        np.abs(read_picture(encoded(Image.fromarray(RGB).quantize(256), "PNG"), "a.png").astype(int) - RGB).mean() < 8
    )


def red_is_green() -> bytes:
    """sRGB with two primaries exchanged."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return srgb.replace(b"rXYZ", b"....", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"....", b"gXYZ", 1)


def test_an_embedded_profile_is_applied_and_a_broken_one_is_passed_over():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read_picture(encoded(Image.fromarray(RGB), "PNG", icc_profile=srgb), "a.png"), RGB)
    picture = read_picture(encoded(Image.fromarray(RGB), "PNG", icc_profile=red_is_green()), "a.png")
    assert np.abs(picture.astype(int) - RGB[..., [1, 0, 2]]).max() <= 2
    assert np.array_equal(read_picture(encoded(Image.fromarray(RGB), "PNG", icc_profile=b"broken"), "a.png"), RGB)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels for it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8))
JPEG, PNG = encoded(NOISE, "JPEG"), encoded(NOISE, "PNG")
# EXIF that turns the picture and says of its resolution that it is a byte, not a fraction: Pillow raises a TypeError.
TURNED_WITHOUT_SENSE = b"Exif\0\0II*\0" + struct.pack("<IHHHIIHHII", 8, 2, 0x0112, 3, 1, 6, 282, 1, 2, 0) + bytes(4)


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"", "a.png", "empty file: it has no bytes"),
        (b"once upon a time", "a.jpg", "not a picture: no known format"),
        (b"\0" * 5000, "a.png", "not a picture: no known format"),
        (JPEG[: len(JPEG) // 2], "a.jpg", "broken picture: image file is truncated"),
        (PNG[:-300], "a.png", "broken picture: "),
        (PNG[:200] + bytes(40) + PNG[240:], "a.png", "broken picture: "),
        (PNG, "a.jpg", "wrong extension: its bytes are PNG, its name ends in .jpg"),
        (JPEG, "a.png", "wrong extension: its bytes are JPEG, its name ends in .png"),
        (png_of_size(60_000, 60_000), "a.png", "too large: "),
        (png_of_size(15_000, 14_000), "a.png", "too large: 15000x14000 is more than 200,000,000 pixels"),
        (png_of_size(0, 40), "a.png", ""),
        (png_of_size(300, 300), "a.png", "broken picture: "),
        (encoded(NOISE, "JPEG", exif=TURNED_WITHOUT_SENSE), "a.jpg", "broken picture: "),
    ],
)
def test_each_way_of_being_broken_has_its_reason(content, name, reason):
    with pytest.raises(Rejected) as caught:
        read_picture(content, name)
    assert str(caught.value).startswith(reason)


def test_small_pictures_are_refused_where_that_is_asked():
    with pytest.raises(Rejected, match="too small: 40x50, its shorter side must have 64 pixels"):
        read_picture(PNG, "a.png", smallest=64)


@lru_cache(maxsize=1)
def photograph(width: int, height: int) -> Image.Image:
    """Noise at many scales, finer ones fainter, as in photographs."""
    dice, layers = np.random.default_rng(0), []
    for cells in (4, 8, 16, 32, 64, 128, 256):
        noise = Image.fromarray(dice.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        layers.append(np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / cells)
    return Image.fromarray((np.sum(layers, axis=0) * 2).clip(0, 255).astype(np.uint8))


def fully_decoded(content: bytes, sizes: SizeMapping) -> np.ndarray:
    picture = read_picture(content, "")
    width, height = sizes(picture.shape[1], picture.shape[0])
    return resize_to(picture, int(width), int(height))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"progressive": True, "subsampling": 0, "quality": 95}),
        ("RGB", {"exif": 6}),
        ("RGB", {"exif": 3}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
@pytest.mark.parametrize("width", [610, 1300, 2500])  # halves, quarters, eighths
def test_a_large_jpeg_decoded_at_a_part_of_its_size_looks_as_if_decoded_in_full(width, mode, options):
    exif = Image.Exif()
    exif[0x0112] = options.get("exif", 1)
    picture = photograph(width, width * 2 // 3).convert(mode)
    content, sizes = encoded(picture, "JPEG", **{**options, "exif": exif}), SizeMapping(resolution=128)
    reduced, full = training_picture(content, sizes), fully_decoded(content, sizes)
    assert reduced.shape == full.shape
    difference = np.abs(reduced.astype(int) - full)
    assert 0 < difference.mean() < 1 and difference.max() < 10


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_below_four_times_its_training_size_is_decoded_in_full(form):
    content, sizes = encoded(photograph(620, 410), form), SizeMapping(resolution=128, crop_to_square=True)
    assert np.array_equal(training_picture(content, sizes), fully_decoded(content, sizes))
    assert np.array_equal(training_picture(content, None), read_picture(content, ""))


def test_a_broken_picture_is_rejected_in_training_too():
    with pytest.raises(Rejected, match="broken picture: image file is truncated"):
        training_picture(JPEG[: len(JPEG) // 2], SizeMapping(resolution=64))


def test_a_profile_is_applied_below_transparency_too():
    exchanged = red_is_green()
    opaque = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    seen = read_picture(encoded(Image.fromarray(opaque), "PNG", icc_profile=exchanged), "a.png")
    assert np.array_equal(seen, read_picture(encoded(Image.fromarray(RGB), "PNG", icc_profile=exchanged), "a.png"))
    assert not np.array_equal(seen, RGB)
