"""A verifier for TinyWorld pictures without neural networks: what stands where, in which colour, and which word.

It works for clean drawings and for what a small diffusion model paints through a lossy codec: the background is the
median colour, every pixel is a mixture of background and one palette colour, connected pixels make an object, and the
object's coverage is correlated with the drawn shapes at every plausible size and place. `detect` returns what GenEval's
rules read (evaluation/benchmarks/geneval.py): class, tight box with a confidence, colour.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from data_modules.tinyworld.combinations import CLASSES, COLORS, Metadata
from data_modules.tinyworld.glyphs import BLOCK, GLYPHS, LETTER_HEIGHT, LETTER_WIDTH, PITCH, glyph_mask
from data_modules.tinyworld.world import COLOR_VALUES, INK, MIN_SIZE, OBJECT_SIZE, shape_mask

MIN_AREA = 35  # pixels; the smallest shape covers twice as much, so less is a smudge
WINDOW = 28  # pixels, side of the square in which an object is compared with the shapes
BLUR = 0.8  # pixels, standard deviation; between a sharp drawing and the codec's softness
# Correlation with the best shape, and its lead over the second best, at which the score reaches 0 and 1.
MATCH_RANGE = (0.65, 0.85)
LEAD_RANGE = (-0.01, 0.01)
LETTER_BORDER = 2  # pixels around a letter that are compared too, and by which it may be off its place
MIN_LETTER_MATCH = 0.6  # correlation below which a mark is no letter

_PALETTE = np.array([COLOR_VALUES[name] for name in COLORS], dtype=np.float32)


def detect(image: np.ndarray) -> list[dict[str, Any]]:
    """Objects of a picture: uint8 (H, W, 3) RGB -> [{"cls": class, "box": [x1, y1, x2, y2, score], "color": name}].

    Boxes are tight, in pixels, x2 and y2 exclusive. The score lies in [0, 1]: above 0.9 for an object of clear shape,
    lower where the shape matches badly or two shapes match alike. Raises ValueError for anything but a uint8 RGB array.
    """
    pixels = _checked(image)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    coverage, color_index = _unmix(pixels, background)
    found = []
    for region, color in _regions(coverage > 0.5, color_index):
        alpha = _object_coverage(pixels, background, region)
        name, score = _match_shape(alpha, region)
        rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
        box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1, round(score, 4)]
        found.append({"cls": name, "box": box, "color": COLORS[color]})
    return found


def read_word(image: np.ndarray) -> str | None:
    """The word of one to four letters that a picture shows, or None where there is no such line of letters.

    `image` is uint8 (H, W, 3) RGB; raises ValueError for anything else.
    """
    pixels = _checked(image)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    direction = np.array(INK, dtype=np.float32) - background
    alpha = ((pixels - background) @ direction) / float(direction @ direction)
    alpha = alpha.clip(0, 1)
    rows, columns = _ink_extent(alpha > 0.5)
    if rows is None or columns is None:
        return None
    width, height = columns[1] - columns[0], rows[1] - rows[0]
    length = round((width + BLOCK) / PITCH)
    expected = length * PITCH - BLOCK
    if not 1 <= length <= 4 or abs(height - LETTER_HEIGHT) > BLOCK or abs(width - expected) > BLOCK:
        return None
    x = round((columns[0] + columns[1] - expected) / 2)
    y = round((rows[0] + rows[1] - LETTER_HEIGHT) / 2)
    letters = [_match_letter(alpha, x + i * PITCH, y) for i in range(length)]
    return "".join(letter for letter, _ in letters) if all(match >= MIN_LETTER_MATCH for _, match in letters) else None


def judge(image: np.ndarray, metadata: Metadata) -> dict[str, Any]:
    """One record for scoring: `{"metadata", "detections"}` for GenEval's rules, `{"metadata", "read", "correct"}` for
    words.

    Give the first kind to `evaluation.benchmarks.geneval.score`; words are no part of GenEval and are counted apart.
    A picture smaller than any that the world draws is one at half its resolution, and is enlarged before.
    """
    if max(_checked(image).shape[:2]) < MIN_SIZE:
        image = _enlarged(image)
    if metadata["tag"] == "word":
        read = read_word(image)
        return {"metadata": metadata, "read": read, "correct": read == metadata["text"]}
    return {"metadata": metadata, "detections": detect(image)}


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Twice as wide and high, bicubic."""
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(image).resize((2 * width, 2 * height), Image.Resampling.BICUBIC))


def _checked(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"The verifier reads uint8 (H, W, 3) RGB pictures, not {image.dtype} {image.shape}.")
    return image.astype(np.float32)


def _unmix(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per pixel: how much of it is object (0 = background, 1 = pure colour), and the index of that palette colour.

    A blurred edge lies on the line from the background to the object's colour, so the colour is found by direction.
    """
    offset = pixels - background
    towards = _PALETTE - background
    lengths = np.linalg.norm(towards, axis=1)
    along = offset @ (towards / lengths[:, None]).T.astype(np.float32)  # (H, W, colours)
    color_index = along.argmax(axis=-1)
    reach = np.take_along_axis(along, color_index[..., None], axis=-1)[..., 0]
    return reach / lengths[color_index], color_index


def _regions(mask: np.ndarray, color_index: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Connected regions of at least MIN_AREA pixels with their colour; a region of two colours is two objects."""
    regions = []
    for region in _parts(mask):
        votes = np.bincount(color_index[region], minlength=len(COLORS))
        strong = np.flatnonzero(votes >= max(MIN_AREA, 0.25 * votes.sum()))
        if len(strong) < 2:
            regions.append((region, int(votes.argmax())))
        else:
            regions += [(part, int(color)) for color in strong for part in _parts(region & (color_index == color))]
    return regions


def _parts(mask: np.ndarray, diagonal: bool = False) -> list[np.ndarray]:
    """The connected parts of a mask that have at least MIN_AREA pixels, each as a mask; `diagonal` joins at corners."""
    labels, _ = ndimage.label(mask, structure=ndimage.generate_binary_structure(2, 2 if diagonal else 1))
    areas = np.bincount(labels.ravel())
    return [labels == i for i in range(1, len(areas)) if areas[i] >= MIN_AREA]


def _object_coverage(pixels: np.ndarray, background: np.ndarray, region: np.ndarray) -> np.ndarray:
    """How much of each pixel belongs to one object, (H, W) in [0, 1]; 0 away from it. Its own colour is the measure."""
    offset = pixels - background
    strength = (offset[region] ** 2).sum(axis=1)
    own = offset[region][strength >= np.median(strength)].mean(axis=0)
    coverage = (offset @ own) / float(own @ own)
    return coverage.clip(0, 1) * ndimage.binary_dilation(region, iterations=2)


def _match_shape(alpha: np.ndarray, region: np.ndarray) -> tuple[str, float]:
    """The class whose mask correlates best with an object's coverage, and the confidence in it."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    top = int(rows[0] + rows[-1] + 1 - WINDOW) // 2
    left = int(columns[0] + columns[-1] + 1 - WINDOW) // 2
    window = np.pad(alpha, WINDOW)[top + WINDOW : top + 2 * WINDOW, left + WINDOW : left + 2 * WINDOW]
    matches = (_shape_bank() @ _normalised(window.ravel())).reshape(len(CLASSES), -1).max(axis=1)
    second, best = np.sort(matches)[-2:]
    score = _ramp(best, MATCH_RANGE) * _ramp(best - second, LEAD_RANGE)
    return CLASSES[int(matches.argmax())], float(score)


def _ramp(value: float, limits: tuple[float, float]) -> float:
    return float(np.clip((value - limits[0]) / (limits[1] - limits[0]), 0, 1))


def _normalised(vectors: np.ndarray) -> np.ndarray:
    """Zero mean and unit length along the last axis, so that a product of two is their correlation."""
    centred = vectors - vectors.mean(axis=-1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-6)


@lru_cache(maxsize=1)
def _shape_bank() -> np.ndarray:
    """Every shape at every size and near-centred place: (classes * variants, WINDOW * WINDOW), normalised."""
    bank = []
    for name in CLASSES:
        for size in range(OBJECT_SIZE - 2, OBJECT_SIZE + 3):
            width = int(np.flatnonzero((shape_mask(name, size) > 0.5).any(axis=0))[[0, -1]].sum()) + 1
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    window = np.zeros((WINDOW, WINDOW), dtype=np.float32)
                    y, x = (WINDOW - size) // 2 + dy, (WINDOW - width) // 2 + dx
                    window[y : y + size, x : x + size] = shape_mask(name, size)
                    bank.append(ndimage.gaussian_filter(window, BLUR).ravel())
    return _normalised(np.array(bank))


def _ink_extent(ink: np.ndarray) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """First and last-plus-one row and column of the ink, without specks; (None, None) where there is none."""
    ink = np.any([np.zeros_like(ink), *_parts(ink, diagonal=True)], axis=0)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if rows.size == 0:
        return None, None
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def _match_letter(alpha: np.ndarray, x: int, y: int) -> tuple[str, float]:
    """The letter whose mask correlates best with the cell at (x, y), tried a pixel or two around it."""
    height, width = LETTER_HEIGHT + 2 * LETTER_BORDER, LETTER_WIDTH + 2 * LETTER_BORDER
    padded = np.pad(alpha, height)  # so that no window leaves the array
    cells = []
    for top in range(y + height - 2 * LETTER_BORDER, y + height + 1):
        for left in range(x + height - 2 * LETTER_BORDER, x + height + 1):
            cells.append(padded[top : top + height, left : left + width].ravel())
    matches = _letter_bank() @ _normalised(np.array(cells)).T
    best = int(matches.max(axis=1).argmax())
    return list(GLYPHS)[best], float(matches[best].max())


@lru_cache(maxsize=1)
def _letter_bank() -> np.ndarray:
    """Every letter with its border: (letters, pixels of the window), normalised."""
    masks = [ndimage.gaussian_filter(np.pad(glyph_mask(letter), LETTER_BORDER), BLUR) for letter in GLYPHS]
    return _normalised(np.array([mask.ravel() for mask in masks]))
