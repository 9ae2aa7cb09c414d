"""From the size of a picture to the size it is trained at: any aspect ratio, in steps of a few pixels, of bounded area.

Pictures that are trained at one size make a bucket. There is no table of buckets: every size is its own, so a picture
loses to cropping only the few pixels of rounding, and nothing is cropped to a square unless asked.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch.nn import functional

from zimage_lit.errors import UserError

PATCH_PIXELS = 16  # side of an image token in pixels: 8 of the latent codec times 2 of the backbone's patch
ROUNDING = 1e-9  # relative; 1024 * sqrt(1024 * 1024 / (1024 * 1024)) shall not count as 1023


@dataclass(frozen=True)
class SizeMapping:
    """The size at which a picture of some size is trained. Called with widths and heights, it is a pure function.

    resolution: side in pixels of the square whose area is the largest allowed; None: the picture's own size.
    multiple: of which both sides are; 16 is one token, 32 and 64 give fewer different sizes.
    upscale: enlarge smaller pictures to `resolution`. Without it only a side below `multiple` is enlarged, to that.
    max_resolution: stands for `resolution` where that is None, against pictures that would not fit the memory.
    max_aspect: longer side over shorter; of a picture beyond it the ends of the long side are cropped.
    crop_to_square: crop the long side of every picture until it is a square.

    Raises UserError for settings that no picture could satisfy.
    """

    resolution: int | None = 1024
    multiple: int = PATCH_PIXELS
    upscale: bool = False
    max_resolution: int = 2048
    max_aspect: float = 4.0
    crop_to_square: bool = False

    def __post_init__(self) -> None:
        key = "data.init_args.sizes"
        if self.multiple < PATCH_PIXELS or self.multiple % PATCH_PIXELS:
            raise UserError(f"{key}.multiple is {self.multiple}: set it to a multiple of {PATCH_PIXELS}.")
        if not 1 <= self.max_aspect < float("inf"):
            raise UserError(f"{key}.max_aspect is {self.max_aspect}: set it to a number from 1 up.")
        if self.upscale and self.resolution is None:
            raise UserError(f"{key}.upscale needs a size to enlarge to: set {key}.resolution or upscale=false.")
        name = "max_resolution" if self.resolution is None else "resolution"
        smallest = int(np.ceil(self.multiple * self.max_aspect**0.5))
        if self.side < smallest:
            raise UserError(
                f"{key}.{name} is {self.side}, too small for an aspect of {self.max_aspect:g} in steps of "
                f"{self.multiple} pixels: set it to {smallest} or more."
            )

    @property
    def side(self) -> int:
        """Side in pixels of the square whose area no training size exceeds."""
        return self.max_resolution if self.resolution is None else self.resolution

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the sizes, as plain values."""
        return asdict(self)

    def __call__(self, width: ArrayLike, height: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Training width and height in pixels, int64, of the shape of the arguments; 0 where there is no picture (0).

        Of the sizes next to the largest that fits, the one whose aspect ratio is nearest the picture's, so the area may
        be a step below `resolution` squared and is never above it.
        """
        original_width, original_height = (np.asarray(side, dtype=np.float64) for side in (width, height))
        missing = (original_width < 1) | (original_height < 1)
        kept_width, kept_height = self._crop(np.maximum(original_width, 1), np.maximum(original_height, 1))
        scale = self.side / np.sqrt(kept_width * kept_height)
        if not self.upscale:
            scale = np.minimum(scale, 1)
        new_width, new_height = self._nearest(kept_width, kept_height, scale)
        return np.where(missing, 0, new_width), np.where(missing, 0, new_height)

    def _crop(self, width: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        aspect = 1.0 if self.crop_to_square else self.max_aspect
        return np.minimum(width, height * aspect), np.minimum(height, width * aspect)

    def _nearest(self, width: np.ndarray, height: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best of the four sizes around (width, height) * scale, in pixels."""
        columns, rows = (np.maximum(np.floor(side * scale / self.multiple + ROUNDING), 1) for side in (width, height))
        best, least = (columns, rows), np.full(np.shape(scale), np.inf)
        for more_columns, more_rows in ((1, 1), (1, 0), (0, 1), (0, 0)):
            candidate = columns + more_columns, rows + more_rows
            distance = np.abs(np.log(candidate[0] / candidate[1]) - np.log(width / height))
            fits = candidate[0] * candidate[1] * self.multiple**2 <= self.side**2
            if not self.upscale:
                larger = (candidate[0] * self.multiple > width) | (candidate[1] * self.multiple > height)
                fits &= ~larger
            better = fits & (distance < least - ROUNDING)
            best = np.where(better, candidate[0], best[0]), np.where(better, candidate[1], best[1])
            least = np.where(better, distance, least)
        within = self._crop(*best)  # rounding may have taken a long picture beyond the limit again
        new_width, new_height = (np.floor(side + ROUNDING).astype(np.int64) * self.multiple for side in within)
        return new_width, new_height


def resize_to(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture, uint8 (H, W, 3), scaled until it just covers the size, its middle cut out: uint8 (height, width, 3).

    Lanczos, over whole pixels of the picture; a side may be stretched by the one pixel that this rounds away.
    """
    old_height, old_width = image.shape[:2]
    if (old_width, old_height) == (width, height):
        return image
    scale = max(width / old_width, height / old_height)
    left = min(max(round((old_width - width / scale) / 2), 0), (old_width - 1) // 2)
    top = min(max(round((old_height - height / scale) / 2), 0), (old_height - 1) // 2)
    return _lanczos(image[top : old_height - top, left : old_width - left], width, height)


def _lanczos(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """torch's, several times faster than Pillow's and the same to within rounding; Pillow's where torch has none."""
    if not torch_has_lanczos():
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    return _by_torch(np.require(image, requirements=["C", "W"]), width, height)


def _by_torch(image: np.ndarray, width: int, height: int) -> np.ndarray:
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    scaled = functional.interpolate(pixels, (height, width), mode="lanczos", antialias=True)
    return np.asarray(scaled[0].permute(1, 2, 0))


@lru_cache(maxsize=1)
def torch_has_lanczos() -> bool:
    """Whether this torch can scale by Lanczos; older ones cannot."""
    try:
        _by_torch(np.zeros((4, 4, 3), dtype=np.uint8), 2, 2)
    except (NotImplementedError, ValueError):
        return False
    return True


def image_tokens(width: ArrayLike, height: ArrayLike, patch_pixels: int = PATCH_PIXELS) -> np.ndarray:
    """Tokens of a picture of training size (pixels): int64, of the shape of the arguments."""
    columns, rows = (np.asarray(side, dtype=np.int64) // patch_pixels for side in (width, height))
    return np.asarray(columns * rows)
