"""The bitmap font of TinyWorld's words: letters of 3x5 blocks, thick enough to survive an 8x8-patch linear codec."""

from functools import cache

import numpy as np

BLOCK = 4  # pixels a block: thinner strokes vanish in the codec
LETTER_WIDTH, LETTER_HEIGHT = 3 * BLOCK, 5 * BLOCK
PITCH = LETTER_WIDTH + BLOCK  # from one letter's left edge to the next one's

# Rows from top to bottom. Every glyph touches all four sides of its cell, so a word's bounding box gives its layout.
# Letters that 3x5 blocks draw badly (K, M, N, Q, V, W, X, Z) are left out; any two that remain differ in two blocks or
# more.
GLYPHS: dict[str, tuple[str, ...]] = {
    "A": (".#.", "#.#", "###", "#.#", "#.#"),
    "B": ("###", "#.#", "##.", "#.#", "###"),
    "C": ("###", "#..", "#..", "#..", "###"),
    "D": ("##.", "#.#", "#.#", "#.#", "##."),
    "E": ("###", "#..", "###", "#..", "###"),
    "F": ("###", "#..", "##.", "#..", "#.."),
    "G": ("###", "#..", "#.#", "#.#", "###"),
    "H": ("#.#", "#.#", "###", "#.#", "#.#"),
    "I": ("###", ".#.", ".#.", ".#.", "###"),
    "J": ("..#", "..#", "..#", "#.#", "###"),
    "L": ("#..", "#..", "#..", "#..", "###"),
    "O": (".#.", "#.#", "#.#", "#.#", ".#."),
    "P": ("###", "#.#", "###", "#..", "#.."),
    "R": ("##.", "#.#", "##.", "#.#", "#.#"),
    "S": ("###", "#..", "###", "..#", "###"),
    "T": ("###", ".#.", ".#.", ".#.", ".#."),
    "U": ("#.#", "#.#", "#.#", "#.#", "###"),
    "Y": ("#.#", "#.#", ".#.", ".#.", ".#."),
}


@cache
def glyph_mask(letter: str) -> np.ndarray:
    """Coverage of one letter: float32 (LETTER_HEIGHT, LETTER_WIDTH), 1 = ink, 0 = background."""
    rows = [[block == "#" for block in row] for row in GLYPHS[letter]]
    return np.kron(np.array(rows, dtype=np.float32), np.ones((BLOCK, BLOCK), dtype=np.float32))


def word_mask(text: str) -> np.ndarray:
    """Coverage of a word in one line: float32 (LETTER_HEIGHT, PITCH * len(text) - BLOCK)."""
    mask = np.zeros((LETTER_HEIGHT, PITCH * len(text) - BLOCK), dtype=np.float32)
    for i, letter in enumerate(text):
        mask[:, i * PITCH : i * PITCH + LETTER_WIDTH] = glyph_mask(letter)
    return mask
