"""Labelled pictures to train the classifier on: TinyWorld's own, and others that keep it from being fooled.

A third is drawn by the world. A third are whole lattices of independent cells, each empty, a shape, or junk: what a
network in training draws and what is none of the shapes (halves, chimeras of two, blobs, two colours at once, too
small, too faint, blurred, noise). A third are strings of random letters, so that letters are read and not words, some
of them broken. Where a thing is between two labels its label is IGNORED, and nothing is learnt there.
"""

import random
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from data_modules.tinyworld.captions import pick
from data_modules.tinyworld.combinations import CLASSES, COLORS
from data_modules.tinyworld.glyphs import BLOCK, GLYPHS, LETTER_HEIGHT, LETTER_WIDTH, PITCH
from data_modules.tinyworld.world import (
    BACKGROUND,
    CELL,
    COLOR_VALUES,
    OBJECT_SIZE,
    Size,
    TinyWorldSample,
    draw,
    shape_mask,
)
from evaluation.fidelity.tinyworld_classifier import (
    EMPTY,
    JUNK,
    KINDS,
    LETTER_LEFT,
    LETTER_TOP,
    LETTERS,
    STEP,
    letter_corner,
)

IGNORED = -1  # as a label: counts for nothing
WORLD_SEED = 52_000_000  # of the first classifier's pictures; a stream that no data set is likely to hold
WORLD_TASKS = {"single_object": 1.0, "two_object": 2.0, "counting": 2.0, "word": 1.0}  # the others show the same
JUNK_RESEMBLANCE = 0.8  # correlation with the most similar shape up to which a mask is none
MASKS = 600  # different junk masks
_INSET = (CELL - OBJECT_SIZE) // 2
_COVERED = 0.1  # share of a cell that ink covers, from which the cell is no longer empty


class Labelled(NamedTuple):
    """Pictures (B, 3, H, W), float in [-1, 1] or uint8, with int64 labels of cells, colours of objects, and letters.

    kinds, colors: (B, rows, columns). letters: (B, 2 rows, 2 columns). IGNORED where there is nothing to learn.
    """

    images: Tensor
    kinds: Tensor
    colors: Tensor
    letters: Tensor

    def at(self, places: Tensor) -> "Labelled":
        """The pictures of these numbers."""
        return Labelled(*(part[places] for part in self))


class _Canvas:
    """One picture in the making, with its labels."""

    def __init__(self, size: Size, rng: random.Random) -> None:
        columns, rows = size[0] // CELL, size[1] // CELL
        level = BACKGROUND + 10 * (rng.random() - 0.5)
        self.background = np.array([level + 4 * (rng.random() - 0.5) for _ in range(3)], dtype=np.float32)
        self.pixels = np.empty((size[1], size[0], 3), dtype=np.float32)
        self.pixels[:] = self.background
        self.kinds = np.full((rows, columns), EMPTY)
        self.colors = np.full((rows, columns), IGNORED)
        self.letters = np.zeros((2 * rows, 2 * columns), dtype=int)

    def blend(self, x: int, y: int, mask: np.ndarray, color: np.ndarray) -> None:
        """Paint a mask (h, w) in a colour (3,), or in one for every pixel (h, w, 3)."""
        patch = self.pixels[y : y + mask.shape[0], x : x + mask.shape[1]]
        patch += mask[..., None] * (color - patch)

    def mark_covered(self) -> None:
        """Cells that hold parts of letters are junk, and undecided where the ink only touches them."""
        ink = (abs(self.pixels - self.background).max(axis=-1) > 60).astype(np.float32)
        rows, columns = self.kinds.shape
        share = ink.reshape(rows, CELL, columns, CELL).mean(axis=(1, 3))
        self.kinds[share > 0] = IGNORED
        self.kinds[share > _COVERED] = JUNK


def training_pictures(count: int, seed: int, size: Size) -> Labelled:
    """`count` pictures of one size (width, height), uint8, a third of each sort; a pure function of the arguments."""
    rng = random.Random(f"tinyworld classifier/{seed}/{size}")
    return _stacked([SORTS[index % len(SORTS)](index, seed, size, rng) for index in range(count)])


def labelled_world(samples: list[TinyWorldSample]) -> Labelled:
    """The world's own pictures of one size with their labels, uint8."""
    return _stacked([_from_world(sample) for sample in samples])


def _stacked(canvases: list[_Canvas]) -> Labelled:
    pixels = np.stack([np.rint(canvas.pixels).clip(0, 255).astype(np.uint8) for canvas in canvases])
    labels = [
        torch.from_numpy(np.stack([getattr(canvas, name) for canvas in canvases]))
        for name in ("kinds", "colors", "letters")
    ]
    return Labelled(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), *labels)


def _world(index: int, seed: int, size: Size, rng: random.Random) -> _Canvas:
    return _from_world(draw(index, WORLD_SEED + seed, size=size, task_weights=WORLD_TASKS))


def _from_world(sample: TinyWorldSample) -> _Canvas:
    height, width, _ = sample.image.shape
    canvas = _Canvas((width, height), random.Random(0))
    canvas.pixels = sample.image.astype(np.float32)
    canvas.background = np.median(canvas.pixels, axis=(0, 1))
    for item in sample.objects:
        row, column = item.box[1] // CELL, item.box[0] // CELL
        canvas.kinds[row, column] = KINDS.index(item.name)
        canvas.colors[row, column] = COLORS.index(item.color)
    if not sample.objects:
        rows = np.flatnonzero((canvas.pixels.max(axis=-1) > 128).any(axis=1))
        columns = np.flatnonzero((canvas.pixels.max(axis=-1) > 128).any(axis=0))
        row, column = (int(rows[0]) - LETTER_TOP) // STEP, (int(columns[0]) - LETTER_LEFT) // STEP
        for place, letter in enumerate(sample.metadata["text"]):
            canvas.letters[row, column + 2 * place] = LETTERS.index(letter)
        canvas.mark_covered()
    return canvas


def _lattice(index: int, seed: int, size: Size, rng: random.Random) -> _Canvas:
    """Every cell on its own: nothing, a shape, or junk; the fuller the picture, by chance, the less of nothing."""
    canvas = _Canvas(size, rng)
    filled = rng.random()
    for row, column in np.ndindex(*canvas.kinds.shape):
        if rng.random() > filled:
            continue
        if rng.random() < 0.6:
            name, color = pick(rng, CLASSES), pick(rng, COLORS)
            canvas.kinds[row, column] = KINDS.index(name)
            canvas.colors[row, column] = COLORS.index(color)
            mask, paint = shape_mask(name, OBJECT_SIZE) * (1 - 0.15 * rng.random()), _paint_of(color, rng)
        else:
            canvas.kinds[row, column] = JUNK
            mask, paint = pick(rng, _JUNK)(rng)
        inset = (CELL - mask.shape[0]) // 2
        canvas.blend(CELL * column + inset, CELL * row + inset, mask, paint)
    return canvas


def _letters(index: int, seed: int, size: Size, rng: random.Random) -> _Canvas:
    """A string of one to four letters somewhere on the places' grid; one in three strings has a broken letter."""
    canvas = _Canvas(size, rng)
    places_down, places_across = canvas.letters.shape
    length = 1 + int(rng.random() * min(4, size[0] // PITCH))
    row = int(rng.random() * (places_down - 2))
    column = int(rng.random() * (places_across - 2 * length + 1))
    broken = int(rng.random() * 3 * length)
    ink = _paint_of("white", rng) if rng.random() < 0.9 else _paint_of(pick(rng, COLORS), rng)
    for place in range(length):
        letter = pick(rng, tuple(GLYPHS))
        blocks, label = _blocks()[letter], LETTERS.index(letter)
        if place == broken:
            blocks, label = _broken(blocks, rng)
        mask = np.kron(blocks, np.ones((BLOCK, BLOCK), dtype=np.float32))
        canvas.blend(*letter_corner(row, column + 2 * place), mask, ink)
        canvas.letters[row, column + 2 * place] = label
    canvas.mark_covered()
    return canvas


def _broken(blocks: np.ndarray, rng: random.Random) -> tuple[np.ndarray, int]:
    """A letter with one to four blocks turned: no letter, or undecided where it is but one block from some letter."""
    turned = blocks.copy()
    for _ in range(1 + int(rng.random() * 4)):
        row, column = int(rng.random() * turned.shape[0]), int(rng.random() * turned.shape[1])
        turned[row, column] = 1 - turned[row, column]
    distances = {letter: int(abs(turned - other).sum()) for letter, other in _blocks().items()}
    nearest = min(distances, key=distances.__getitem__)
    if distances[nearest] == 0:
        return turned, LETTERS.index(nearest)
    return turned, IGNORED if distances[nearest] == 1 else 0


@cache
def _blocks() -> dict[str, np.ndarray]:
    """Letter -> its blocks, float32 (5, 3), 1 = ink."""
    rows, columns = LETTER_HEIGHT // BLOCK, LETTER_WIDTH // BLOCK
    return {
        letter: np.array([[block == "#" for block in row] for row in glyph], dtype=np.float32).reshape(rows, columns)
        for letter, glyph in GLYPHS.items()
    }


def _paint_of(color: str, rng: random.Random) -> np.ndarray:
    """The colour with more jitter than the world's, as a network in training would miss it."""
    return np.array([value + 40 * (rng.random() - 0.5) for value in COLOR_VALUES[color]], dtype=np.float32)


def _half_plane(size: int, rng: random.Random, spread: float = 0.5) -> np.ndarray:
    """1 on one side of a random line near the middle, 0 on the other: float32 (size, size)."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    angle, offset = 2 * np.pi * rng.random(), spread * (rng.random() - 0.5)
    side = grid[None, :] * np.cos(angle) + grid[:, None] * np.sin(angle) - offset
    return (side > 0).astype(np.float32)


def _partial_mask(rng: random.Random) -> np.ndarray:
    return shape_mask(pick(rng, CLASSES), OBJECT_SIZE) * _half_plane(OBJECT_SIZE, rng)


def _chimera_mask(rng: random.Random) -> np.ndarray:
    side = _half_plane(OBJECT_SIZE, rng)
    first, second = (shape_mask(pick(rng, CLASSES), OBJECT_SIZE) for _ in range(2))
    return side * first + (1 - side) * second


def _blob_mask(rng: random.Random) -> np.ndarray:
    noise = np.random.default_rng(int(rng.random() * 2**32)).standard_normal((OBJECT_SIZE, OBJECT_SIZE))
    smooth = ndimage.gaussian_filter(noise, 1 + 1.5 * rng.random())
    return (smooth > np.quantile(smooth, 0.3 + 0.4 * rng.random())).astype(np.float32)


@cache
def _junk_masks() -> tuple[np.ndarray, ...]:
    """Masks that look like no shape: the same for every classifier."""
    rng = random.Random("tinyworld junk")
    makers = (_partial_mask, _chimera_mask, _blob_mask)
    masks: list[np.ndarray] = []
    while len(masks) < MASKS:
        mask = pick(rng, makers)(rng)
        if 0.1 < mask.mean() < 0.99 and _resemblance(mask) <= JUNK_RESEMBLANCE:
            masks.append(mask)
    return tuple(masks)


def _resemblance(mask: np.ndarray) -> float:
    """Largest correlation with a shape, at places up to one pixel off."""
    return float((_shape_bank() @ _standardised(np.pad(mask, _INSET))).max())


@cache
def _shape_bank() -> np.ndarray:
    """Every shape in the middle of its cell and one pixel off: (shapes * 9, CELL * CELL), standardised."""
    shapes = [np.pad(shape_mask(name, OBJECT_SIZE), _INSET) for name in CLASSES]
    shifts = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    return np.stack([_standardised(np.roll(shape, shift, (0, 1))) for shape in shapes for shift in shifts])


def _standardised(mask: np.ndarray) -> np.ndarray:
    """As a vector of mean 0 and length 1, so that a product of two is their correlation."""
    centred = mask.ravel() - mask.mean()
    return centred / np.linalg.norm(centred)


Patch = tuple[np.ndarray, np.ndarray]  # mask (h, w), and the colour (3,) or colours (h, w, 3) that it is painted in


def _misshapen(rng: random.Random) -> Patch:
    return pick(rng, _junk_masks()), _paint_of(pick(rng, COLORS), rng)


def _too_small(rng: random.Random) -> Patch:
    return shape_mask(pick(rng, CLASSES), 5 + int(4 * rng.random())), _paint_of(pick(rng, COLORS), rng)


def _too_faint(rng: random.Random) -> Patch:
    mask = shape_mask(pick(rng, CLASSES), OBJECT_SIZE) * (0.15 + 0.2 * rng.random())
    return mask, _paint_of(pick(rng, COLORS), rng)


def _blurred(rng: random.Random) -> Patch:
    mask = np.pad(shape_mask(pick(rng, CLASSES), OBJECT_SIZE), _INSET)
    return ndimage.gaussian_filter(mask, 2.5 + 2 * rng.random()), _paint_of(pick(rng, COLORS), rng)


def _two_colors(rng: random.Random) -> Patch:
    first = pick(rng, COLORS)
    second = pick(rng, [color for color in COLORS if color != first])
    side = _half_plane(OBJECT_SIZE, rng, spread=0.2)[..., None]
    paint = side * _paint_of(first, rng) + (1 - side) * _paint_of(second, rng)
    return shape_mask(pick(rng, CLASSES), OBJECT_SIZE), paint


def _noise(rng: random.Random) -> Patch:
    noise = np.random.default_rng(int(rng.random() * 2**32)).standard_normal((CELL, CELL, 3)).astype(np.float32)
    return np.ones((CELL, CELL), dtype=np.float32), 110 + (30 + 60 * rng.random()) * noise


_JUNK = (_misshapen, _misshapen, _misshapen, _too_small, _too_faint, _blurred, _two_colors, _two_colors, _noise)
SORTS = (_world, _lattice, _letters)
