"""Pictures from anywhere, turned into what the data sets store: uint8 RGB the right way up, or a reason why not.

Every picture is decoded in full once, so that what is broken is found at preparation and not in the middle of a run.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

# What a file name may end in, by the format that its bytes are in. JPEG's own variant MPO comes from phones.
EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx"),
    "TGA": (".tga",),
}
LARGEST = 200_000_000  # pixels; more is taken for a decompression bomb


class Rejected(Exception):
    """Why a sample cannot be used, as a phrase; the first word or two before the colon name the kind of reason."""


def read_picture(content: bytes, name: str, smallest: int = 1, largest: int = LARGEST) -> np.ndarray:
    """The picture in a file's bytes: uint8 (H, W, 3) RGB, turned as its EXIF says, on white where it is transparent.

    name: the file's name, whose ending must fit the format; one without an ending fits all.
    smallest: pixels that the shorter side must have.   largest: pixels that the whole may have.
    Colours go through the embedded profile to sRGB. 16-bit levels are scaled to 8. Of an animation, the first frame.
    Raises Rejected.
    """
    if not content:
        raise Rejected("empty file: it has no bytes")
    try:
        with _own_judgement():
            picture = Image.open(io.BytesIO(content))
            _check_frame(picture, name, smallest, largest)
            picture.load()
    except Rejected:
        raise
    except UnidentifiedImageError:
        raise Rejected("not a picture: no known format") from None
    except Exception as error:  # on broken bytes Pillow's decoders raise OSError, SyntaxError, EOFError and others
        raise Rejected(f"broken picture: {error}") from None
    return _as_rgb(picture)


@contextmanager
def _own_judgement() -> Iterator[None]:
    """Pillow neither refuses large pictures nor warns of them and of odd tags."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_frame(picture: Image.Image, name: str, smallest: int, largest: int) -> None:
    """What can be said before the pixels are decoded."""
    width, height = picture.size
    if width * height > largest:
        raise Rejected(f"too large: {width}x{height} is more than {largest:,} pixels")
    if min(width, height) < smallest:
        raise Rejected(f"too small: {width}x{height}, its shorter side must have {smallest} pixels")
    suffix, known = PurePath(name).suffix.lower(), EXTENSIONS.get(picture.format or "", ())
    if suffix and suffix not in known:
        raise Rejected(f"wrong extension: its bytes are {picture.format}, its name ends in {suffix}")


def _as_rgb(picture: Image.Image) -> np.ndarray:
    profile = picture.info.get("icc_profile")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        levels = np.asarray(picture, dtype=np.float64)
        # Pillow reads 16-bit PNG as "I;16" or "I"; of wider or fractional levels nothing says what white is
        scale = 65535 if levels.max(initial=0) > 255 or picture.mode != "F" else 255
        gray = np.rint(levels.clip(0, scale) * (255 / scale)).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if picture.has_transparency_data:
        seen = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return np.asarray(Image.alpha_composite(white, seen).convert("RGB"))
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        converted = _through_profile(picture, profile)
        if converted is not None:
            return np.asarray(converted)
    return np.asarray(picture.convert("RGB"))


def _through_profile(picture: Image.Image, profile: bytes) -> Image.Image | None:
    """The picture in sRGB; None where its profile is broken or of another kind of colour than its pixels."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
