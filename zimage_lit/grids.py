"""Grids of pictures with their prompts, for people."""

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LINE = 14  # pixels of one line of a label
GAP = 8


def labelled_grid(
    pictures: Sequence[Image.Image], labels: Sequence[str], columns: int | None = None, cell: int = 160
) -> Image.Image:
    """Pictures in rows, each enlarged (or reduced) to `cell` pixels wide with its label under it."""
    columns = columns or min(len(pictures), 6)
    font = ImageFont.load_default(11)
    lines = [textwrap.wrap(label, cell // 6)[:3] or [""] for label in labels]
    text_height = LINE * max(map(len, lines))
    scaled = [picture.convert("RGB").resize(_scaled(picture, cell), _filter(picture, cell)) for picture in pictures]
    height = max(picture.height for picture in scaled) + text_height + GAP
    rows = -(-len(pictures) // columns)
    grid = Image.new("RGB", (columns * (cell + GAP) + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(grid)
    for place, (picture, label) in enumerate(zip(scaled, lines, strict=True)):
        x, y = GAP + place % columns * (cell + GAP), GAP + place // columns * height
        grid.paste(picture, (x, y))
        draw.multiline_text((x, y + picture.height + 2), "\n".join(label), fill="black", font=font, spacing=2)
    return grid


def encoded(picture: Image.Image, form: str) -> bytes:
    """The bytes of a file in the format `form`, PNG or WEBP for example."""
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return buffer.getvalue()


def _scaled(picture: Image.Image, cell: int) -> tuple[int, int]:
    return cell, max(1, round(picture.height * cell / picture.width))


def _filter(picture: Image.Image, cell: int) -> Image.Resampling:
    """Small toys keep their pixels, real pictures are reduced smoothly."""
    return Image.Resampling.NEAREST if picture.width <= cell else Image.Resampling.LANCZOS
