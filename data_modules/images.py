"""Pictures from anywhere, as uint8 RGB the right way up, or a reason why not.

Every picture is decoded in full once, so that what is broken is found at preparation and not in the middle of a run.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import PurePath

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from data_modules.buckets import SizeMapping, resize_to

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
LYING = (5, 6, 7, 8)  # values of EXIF's Orientation that exchange width and height
SPARE = 2  # how many times the training size a reduced JPEG has at least, along each side
SAME_COLOUR = 2  # levels; what rounding makes of sRGB in the profiles that say sRGB


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
    with _named_failures(), _own_judgement():
        picture = Image.open(io.BytesIO(content))
        _check_frame(picture, name, smallest, largest)
        return _as_rgb(picture)


def training_picture(content: bytes, sizes: SizeMapping | None) -> np.ndarray:
    """A picture that `read_picture` has accepted, at its training size: uint8 (H, W, 3). None: as it is stored.

    A JPEG of more than twice its training size is not decoded in full: libjpeg leaves out the highest frequencies and
    gives a half, a quarter or an eighth of the pixels along each side, still at least twice as many as are asked for.
    After the scaling that follows, pictures differ from the fully decoded by one of 255 levels on average, or two.

    Raises Rejected.
    """
    with _named_failures(), _own_judgement():
        picture = Image.open(io.BytesIO(content))
        size = _reduce(picture, sizes) if sizes else None
        image = _as_rgb(picture)
    if sizes is None:
        return image
    width, height = size or sizes(image.shape[1], image.shape[0])
    return resize_to(image, int(width), int(height))


def _reduce(picture: Image.Image, sizes: SizeMapping) -> tuple[int, int] | None:
    """Have a JPEG that is not yet decoded come out smaller; gives its training size, None for other formats."""
    if picture.format not in ("JPEG", "MPO"):
        return None
    lying = picture.getexif().get(ExifTags.Base.Orientation) in LYING
    width, height = (int(side) for side in sizes(*(picture.size[::-1] if lying else picture.size)))
    stored = (height, width) if lying else (width, height)
    picture.draft(None, (SPARE * stored[0], SPARE * stored[1]))
    return width, height


@contextmanager
def _named_failures() -> Iterator[None]:
    """Whatever a decoder raises becomes Rejected; that memory is short says nothing about a picture."""
    try:
        yield
    except (Rejected, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Rejected("not a picture: no known format") from None
    except Exception as error:  # on broken bytes Pillow's decoders raise OSError, SyntaxError, EOFError and others
        raise Rejected(f"broken picture: {str(error) or type(error).__name__}") from None


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
    """Decode what is not yet decoded; for what comes out see `read_picture`. Nothing is copied that need not be."""
    picture.load()
    profile = picture.info.get("icc_profile")
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        levels = np.asarray(picture, dtype=np.float64)
        # Pillow reads 16-bit PNG as "I;16" or "I"; of wider or fractional levels nothing says what white is
        scale = 65535 if levels.max(initial=0) > 255 or picture.mode != "F" else 255
        gray = np.rint(levels.clip(0, scale) * (255 / scale)).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    if picture.has_transparency_data:
        seen = picture.convert("RGBA")
        colours = Image.fromarray(_in_srgb(seen.convert("RGB"), profile if picture.mode == "RGBA" else None))
        white = Image.new("RGB", picture.size, "white")
        return np.asarray(Image.composite(colours, white, seen.getchannel("A")))
    return _in_srgb(picture, profile)


def _in_srgb(picture: Image.Image, profile: bytes | None) -> np.ndarray:
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        transform = _to_srgb(profile, picture.mode)
        if transform is not None:
            return np.asarray(transform.apply(picture))
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


@lru_cache(maxsize=32)  # a data set has pictures of few cameras, and building takes longer than applying
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None where it says sRGB, is broken or of another kind of colour than `mode`."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
    if mode != "CMYK":
        levels = np.linspace(0, 255, 16, dtype=np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(64, 64, 3)
        colours = Image.fromarray(cube).convert(mode)
        change = np.asarray(transform.apply(colours), dtype=int) - np.asarray(colours.convert("RGB"), dtype=int)
        if np.abs(change).max() <= SAME_COLOUR:
            return None
    return transform
