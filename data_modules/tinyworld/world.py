"""TinyWorld: an endless, seeded world of small pictures with captions and ground truth in GenEval's form.

One to four flat shapes, or one short word, on a plain dark background. `draw` is a pure function of its arguments: no
state, no files, the same picture on every machine. What can be said about a picture, and what training never sees,
stands in combinations.py; the sentences in captions.py; the font in glyphs.py.

The world is made to be learnt in minutes through `PatchPCACodec`: shapes that stay different without their fine detail,
colours far apart and all lighter than the background, so that an object of any colour is first of all something bright,
and a lattice of cells, each one token of the tiny backbone, of which every object fills one, in a quarter of its own
and beside no other object, not even aslant. A picture is 64x64 pixels, or any other number of cells from three up a
side, by the same rules.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

from data_modules.tinyworld.captions import LANGUAGES, captions, pick, prompt
from data_modules.tinyworld.combinations import (
    CLASSES,
    COLORS,
    HELDOUT_COLORS,
    TASKS,
    Metadata,
    Split,
    is_heldout_scene,
    statements,
)
from data_modules.tinyworld.glyphs import BLOCK, LETTER_HEIGHT, PITCH, word_mask

Size = tuple[int, int]  # (width, height) of a picture in pixels
IMAGE_SIZE = 64  # pixels, both sides of a picture where nothing else is said
DEFAULT_SIZE: Size = (IMAGE_SIZE, IMAGE_SIZE)
CELL = 16  # pixels, side of a lattice cell, one token of the tiny backbone: four by four cells in the default picture
MIN_SIZE, MAX_SIZE = 3 * CELL, 64 * CELL  # pixels; below, four objects have no place, above, tokens have no position
OBJECT_SIZE = 14  # pixels, side of the square that a shape fills, in the middle of its cell

BACKGROUND = 24.0
COLOR_VALUES: dict[str, tuple[int, int, int]] = {
    "red": (250, 70, 60),
    "yellow": (245, 220, 50),
    "green": (70, 215, 90),
    "blue": (40, 100, 250),
    "purple": (165, 40, 230),
    "pink": (250, 110, 190),
    "white": (245, 245, 245),
}
INK = COLOR_VALUES["white"]  # of words

# The harder a task, the more of it; words are an extra and stay a small share. What one task gains another loses: the
# five that decide a score are about balanced here.
TASK_WEIGHTS = {
    "single_object": 0.03,
    "two_object": 0.15,
    "counting": 0.29,
    "colors": 0.09,
    "position": 0.26,
    "color_attr": 0.15,
    "word": 0.03,
}

# (x, y) from the reference to the subject
_DIRECTIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}


@dataclass(frozen=True)
class DrawnObject:
    """One object as drawn: class, colour name, and the square (x1, y1, x2, y2) in pixels that its shape fills."""

    name: str
    color: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class TinyWorldSample:
    """One picture with all that is known of it.

    image: uint8 (H, W, 3) RGB, (64, 64, 3) by default. captions: language ("en", "zh") -> kind ("tags", "short",
    "medium", "long", "user") -> text. metadata: GenEval's {"tag", "include", "exclude"?, "prompt"}, or {"tag": "word",
    "text", "prompt"}.
    objects: what was drawn, in the order of the include clauses; empty for words.
    """

    image: np.ndarray
    captions: dict[str, dict[str, str]]
    metadata: Metadata
    objects: tuple[DrawnObject, ...]


def draw(
    index: int,
    seed: int = 0,
    split: Split = "train",
    task: str | None = None,
    size: Size = DEFAULT_SIZE,
    task_weights: Mapping[str, float] = TASK_WEIGHTS,
) -> TinyWorldSample:
    """Sample number `index` of the endless stream `seed`: a pure function of its arguments.

    `task` (one of `combinations.TASKS`) forces the task, otherwise it is drawn by `task_weights`, shares in proportion.
    `split="heldout"` says only held-out combinations; `"train"` neither says nor draws any. `size` is (width, height)
    in pixels, multiples of 16 from 48 to 1024; a picture too narrow for some words shows shorter ones only. Raises
    ValueError for an index, split, task or size that does not exist.
    """
    if index < 0:
        raise ValueError(f"TinyWorld has samples 0, 1, 2 and so on, no sample {index}.")
    if split not in ("train", "heldout"):
        raise ValueError(f"TinyWorld knows no split {split!r}: choose train or heldout.")
    check_size(size)
    rng = random.Random(f"tinyworld/{seed}/{split}/{index}")
    drawn_task = _weighted_task(rng.random(), task_weights)
    return _shown(pick(rng, fitting_statements(task or drawn_task, split, size[0])), size, rng)


def draw_statement(metadata: Metadata, index: int, seed: int = 0, size: Size = DEFAULT_SIZE) -> TinyWorldSample:
    """Picture number `index` of the endless many that show one statement: a pure function of its arguments.

    What the statement leaves open (places, colours, background) is drawn anew for each. A "prompt" in the metadata is
    not looked at. Raises ValueError for a negative index, a size that does not exist, and a word too long for it.
    """
    if index < 0:
        raise ValueError(f"TinyWorld has pictures 0, 1, 2 and so on of a statement, no picture {index}.")
    check_size(size)
    statement = {key: value for key, value in metadata.items() if key != "prompt"}
    if _word_width(statement) > size[0]:
        raise ValueError(f"the word {statement['text']} is wider than a picture of {size[0]} pixels.")
    rng = random.Random(f"tinyworld statement/{seed}/{index}/{json.dumps(statement, sort_keys=True)}")
    return _shown(statement, size, rng)


def _shown(statement: Metadata, size: Size, rng: random.Random) -> TinyWorldSample:
    """A picture of what a statement says, with its captions."""
    metadata = {**statement, "prompt": prompt(statement)}
    canvas, background = _canvas(size, rng)
    if metadata["tag"] == "word":
        _write(canvas, background, metadata["text"], rng)
        return TinyWorldSample(canvas, captions(metadata, (), rng), metadata, ())
    objects = _arrange(metadata, size, rng)
    for item in objects:
        _paint(canvas, background, item, rng)
    things = [(item.name, item.color) for item in objects]
    return TinyWorldSample(canvas, captions(metadata, things, rng), metadata, objects)


def check_size(size: Size) -> None:
    """ValueError where no picture of this size (width, height) can be drawn."""
    if any(side % CELL or not MIN_SIZE <= side <= MAX_SIZE for side in size):
        raise ValueError(
            f"TinyWorld draws no picture of {size[0]}x{size[1]}: its sides are multiples of {CELL} pixels, from "
            f"{MIN_SIZE} to {MAX_SIZE}."
        )


@cache
def fitting_statements(task: str, split: Split, width: int) -> tuple[Metadata, ...]:
    """What a split may say in a task in pictures of this width, in pixels: all but the words that are wider."""
    return tuple(statement for statement in statements(task, split) if _word_width(statement) <= width)


def _word_width(statement: Metadata) -> int:
    """Pixels across of a statement's word, if it is one."""
    return PITCH * len(statement.get("text", "")) - BLOCK


def heldout_prompts(per_task: int, seed: int = 0, language: str = "en", width: int = IMAGE_SIZE) -> list[Metadata]:
    """`per_task` statements of each task (GenEval's six and "word"), task after task, held-out combinations only.

    For pictures of `width` pixels: narrow ones have no room for long words.

    Each task's held-out statements are shuffled by `seed` and repeated in turn where there are fewer of them than
    `per_task` (counting has three). "prompt" is in `language`; `single_object` holds nothing out (see combinations.py).
    """
    if language not in LANGUAGES:
        raise ValueError(f"TinyWorld speaks {' and '.join(LANGUAGES)}, not {language!r}.")
    prompts = []
    for task in TASKS:
        rng = random.Random(f"tinyworld prompts/{seed}/{task}")
        order = sorted(fitting_statements(task, "heldout", width), key=lambda _: rng.random())
        for i in range(per_task):
            statement = order[i % len(order)]
            prompts.append({**statement, "prompt": prompt(statement, language)})
    return prompts


def _weighted_task(uniform: float, weights: Mapping[str, float]) -> str:
    if weights is not TASK_WEIGHTS:  # whose sum is 1
        uniform *= sum(weights.values())
    for task, weight in weights.items():
        uniform -= weight
        if uniform < 0:
            return task
    return next(task for task, weight in reversed(list(weights.items())) if weight > 0)  # rounding in the sum


def _arrange(metadata: Metadata, size: Size, rng: random.Random) -> tuple[DrawnObject, ...]:
    """Colours and places for the objects of a statement."""
    include = metadata["include"]
    names = [clause["class"] for clause in include for _ in range(clause["count"])]
    colors = _choose_colors(include, rng)
    if metadata["tag"] == "counting":
        colors = colors * len(names)  # one colour for all: the count, not the palette, is what the sentence says
    boxes = _place(len(names), include[-1].get("position", (None,))[0], size, rng)
    return tuple(DrawnObject(*item) for item in zip(names, colors, boxes, strict=True))


def _choose_colors(include: Sequence[Metadata], rng: random.Random) -> list[str]:
    """One colour a clause: the stated one, or a random one; two objects differ, and nothing held out appears unsaid."""
    if all("color" in clause for clause in include):
        return [clause["color"] for clause in include]
    while True:
        things = [(clause["class"], pick(rng, _FREE_COLORS[clause["class"]])) for clause in include]
        colors = [color for _, color in things]
        if len(things) == 1 or (colors[0] != colors[1] and not is_heldout_scene(*things)):
            return colors


_FREE_COLORS = {name: [color for color in COLORS if (name, color) not in HELDOUT_COLORS] for name in CLASSES}


def _place(count: int, relation: str | None, size: Size, rng: random.Random) -> list[tuple[int, int, int, int]]:
    """Squares in different quarters, no two in neighbouring cells; uniform over all such places where the second stands
    in `relation` to the first. Where a side has an odd number of cells, the middle one is of the quarters before it.

    That neighbours of an object are empty is a rule which looks the same everywhere, unlike the quarters' borders, and
    a network whose tokens know their places by rotation learns it first.
    """
    columns, rows = (side // CELL for side in size)
    while True:
        cells = [(int(rng.random() * columns), int(rng.random() * rows)) for _ in range(count)]
        quarters = {(2 * column // columns, 2 * row // rows) for column, row in cells}
        if len(quarters) < count or any(_touch(*pair) for pair in combinations(cells, 2)):
            continue
        if relation is None or _stands(cells[1], relation, cells[0], (columns, rows)):
            inset = (CELL - OBJECT_SIZE) // 2
            corners = [(CELL * column + inset, CELL * row + inset) for column, row in cells]
            return [(x, y, x + OBJECT_SIZE, y + OBJECT_SIZE) for x, y in corners]


def _touch(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two cells have a side or a corner in common."""
    return max(abs(first[0] - second[0]), abs(first[1] - second[1])) <= 1


def _stands(subject: tuple[int, int], relation: str, reference: tuple[int, int], lattice: tuple[int, int]) -> bool:
    """Whether the subject lies clearly on that side: on the other side of the picture's middle, not aslant.

    GenEval asks for less, but then one picture often satisfies two relations.
    """
    right, down = _DIRECTIONS[relation]
    middle_x, middle_y = ((cells - 1) / 2 for cells in lattice)
    subject_side, reference_side = ((x - middle_x) * right + (y - middle_y) * down for x, y in (subject, reference))
    across = abs(subject[0] - reference[0]) * abs(down) + abs(subject[1] - reference[1]) * abs(right)
    return reference_side < 0 < subject_side and 2 * across <= subject_side - reference_side


def _canvas(size: Size, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """A plain picture and its colour: near-black, a little different every time."""
    level = BACKGROUND + 10 * (rng.random() - 0.5)
    background = np.array([level + 4 * (rng.random() - 0.5) for _ in range(3)], dtype=np.float32)
    canvas = np.empty((size[1], size[0], 3), dtype=np.uint8)
    canvas[:] = np.rint(background).astype(np.uint8)
    return canvas, background


def _paint(canvas: np.ndarray, background: np.ndarray, item: DrawnObject, rng: random.Random) -> None:
    x1, y1, x2, y2 = item.box
    _blend(canvas[y1:y2, x1:x2], shape_mask(item.name, x2 - x1), background, _jittered(COLOR_VALUES[item.color], rng))


def _write(canvas: np.ndarray, background: np.ndarray, text: str, rng: random.Random) -> None:
    """The word in one line, centred across, at one of three heights about the middle."""
    mask = word_mask(text)
    height, width, _ = canvas.shape
    x = (width - PITCH * len(text) + BLOCK) // 2
    y = height // 2 + pick(rng, (-20, -12, -4))
    _blend(canvas[y : y + LETTER_HEIGHT, x : x + mask.shape[1]], mask, background, _jittered(INK, rng))


def _jittered(color: Sequence[int], rng: random.Random) -> np.ndarray:
    return np.array([value + 12 * (rng.random() - 0.5) for value in color], dtype=np.float32)


def _blend(patch: np.ndarray, mask: np.ndarray, background: np.ndarray, color: np.ndarray) -> None:
    patch[:] = np.rint(background + mask[..., None] * (color - background)).clip(0, 255).astype(np.uint8)


@cache
def shape_mask(name: str, size: int) -> np.ndarray:
    """Coverage of a shape in its cell, antialiased: float32 (size, size), 1 = inside. Do not change the array."""
    samples = 8  # per pixel and axis
    grid = (np.arange(size * samples, dtype=np.float32) + 0.5) / (size * samples) * 2 - 1
    inside = np.broadcast_to(_inside(name, grid[None, :], grid[:, None]), (size * samples, size * samples))
    return inside.reshape(size, samples, size, samples).mean(axis=(1, 3), dtype=np.float32)


def _inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether points of the unit cell (u to the right, v downwards, both in [-1, 1]) lie in a shape."""
    radius = np.hypot(u, v)
    if name == "circle":
        return radius <= 1
    if name == "square":
        return (abs(u) <= 0.93) & (abs(v) <= 0.93)
    if name == "diamond":
        return abs(u) + abs(v) <= 1
    if name == "cross":
        return (abs(u) <= 0.34) | (abs(v) <= 0.34)
    if name == "ring":
        return (radius <= 1) & (radius >= 0.52)
    if name == "moon":  # a disc less a disc to its right
        return (np.hypot(u - 0.2, v) <= 1) & (np.hypot(u - 0.85, v) >= 0.85)
    raise ValueError(f"TinyWorld has no shape {name!r}: choose one of {', '.join(CLASSES)}.")
