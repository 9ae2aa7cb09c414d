"""Pictures of a model as they lie in a folder: found by their names, cut out of grids, decoded, told apart by a hash.

Two layouts are read: our own, `<prompt id>/<image>.png`, and the one that the benchmark's own tools write. Files may
end in .png, .jpg, .jpeg or .webp.
"""

import io
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageOps, UnidentifiedImageError

from evaluation.benchmarks.protocol import PlannedImage
from zimage_lit.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError,
    ArithmeticError, AttributeError, LookupError, TypeError,  # of damaged EXIF data
)  # fmt: skip
MISSING = "missing"


class Place(NamedTuple):
    """Where a picture stands."""

    file: Path
    cell: tuple[int, int]  # (row, column) in the grid that the prompt's pictures make,
    shape: tuple[int, int]  # and how many of them that has
    cut: bool  # whether the file is that grid


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of one benchmark and language.

    gallery: as OneIG-Bench's tools take grids, where a black cell stands for a picture that is missing.
    compressed: whether judges see pictures as OneIG-Bench's tools hand them over: all of a prompt in one grid as WebP,
        then each as JPEG, both as PIL writes them by default. A grid that is in the folder has been WebP already, or
        has not, as it may be.
    """

    folder: Path
    gallery: bool = False
    compressed: bool = False

    def find(self, plan: Sequence[PlannedImage]) -> list[Place | None]:
        """Where each of a prompt's pictures stands, None for those that are missing.

        plan: of all pictures that the protocol has for the prompt. UserError where several models' grids are there.
        """
        cells = [one.cell or (0, one.image) for one in plan]
        shape = (max(row for row, _ in cells) + 1, max(column for _, column in cells) + 1)
        own = [_with_any_ending(self.folder / one.file) for one in plan]
        official = [] if all(own) else self._official(plan[0])
        found: list[Place | None] = []
        for one, cell, file in zip(plan, cells, own, strict=True):
            files = [file] if file else official[:1] if one.cell else official[one.image : one.image + 1]
            found.append(Place(files[0], cell, shape, cut=file is None and one.cell is not None) if files else None)
        return found

    def state(self, places: Sequence[Place | None]) -> list[list[Any] | None]:
        """What must be as it was for a prompt's pictures to be the same: names, cells, sizes and times of change."""
        found = [None if place is None else (place, place.file.stat()) for place in places]
        return [one and [self.name(one[0]), one[0].cell, one[1].st_size, one[1].st_mtime_ns] for one in found]

    def name(self, place: Place) -> str:
        """A picture's file below the folder."""
        return place.file.relative_to(self.folder).as_posix()

    def load(self, places: Sequence[Place | None]) -> list[Image.Image | str]:
        """A prompt's pictures, RGB, as judges see them; in the place of one that is lost, why."""
        files = {place.file: _decoded(place.file) for place in places if place}
        pictures = [MISSING if place is None else self._picture(place, files[place.file]) for place in places]
        if not self.compressed:
            return pictures
        pairs = list(zip(places, pictures, strict=True))
        kept = {place.cell: one for place, one in pairs if place and not isinstance(one, str)}
        if kept and not any(place.cut for place in places if place):
            kept = _through_a_grid(kept, next(place.shape for place in places if place))
        return [
            one if isinstance(one, str) or place is None else _reencoded(kept[place.cell], "JPEG")
            for place, one in pairs
        ]

    def _picture(self, place: Place, picture: Image.Image | str) -> Image.Image | str:
        """A picture, or why there is none, out of what its file holds."""
        if not place.cut or isinstance(picture, str):
            return picture
        rows, columns = place.shape
        if picture.width % columns or picture.height % rows:
            return f"broken: {picture.width}x{picture.height} pixels are no grid of {rows} rows and {columns} columns"
        width, height = picture.width // columns, picture.height // rows
        row, column = place.cell
        cell = picture.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))
        return "missing: its cell of the grid is black" if self.gallery and cell.getbbox() is None else cell

    def _official(self, planned: PlannedImage) -> list[Path]:
        """The prompt's files in the benchmark's own layout, by the numbers in their names."""
        name = Path(planned.official_file)
        pattern = planned.official_pattern or f"{escape(str(name.parent))}/{escape(name.stem)}.*"
        if not (self.folder / "images").is_dir():  # OneIG-Bench's folder of that name may be given itself
            pattern = pattern.removeprefix("images/")
        matches = [path for path in self.folder.glob(pattern) if path.suffix.lower() in ENDINGS]
        if planned.cell and len({path.parent for path in matches}) > 1:
            examples = " and ".join(str(path) for path in sorted(matches)[:2])
            raise UserError(
                f"{self.folder} holds pictures of several models, such as {examples}: leave one model's alone in it."
            )
        return sorted(matches, key=lambda path: ([int(number) for number in re.findall(r"\d+", path.stem)], path.name))


def picture_hash(picture: Image.Image) -> str:
    """SHA-256, as hex, of an RGB picture's "<width>x<height>\\n" and its bytes, row by row."""
    digest = sha256(f"{picture.width}x{picture.height}\n".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def _with_any_ending(path: Path) -> Path | None:
    return next((found for ending in ENDINGS if (found := path.with_suffix(ending)).is_file()), None)


def _decoded(file: Path) -> Image.Image | str:
    """The whole picture, upright and RGB, or why there is none: a file's header alone says nothing of the rest."""
    try:
        with Image.open(file) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except UnidentifiedImageError:
        return "broken: no picture that can be read"  # whose own message has the folder's name
    except DECODING_ERRORS as error:
        return f"broken: {getattr(error, 'strerror', None) or error}"


def _through_a_grid(
    pictures: dict[tuple[int, int], Image.Image], shape: tuple[int, int]
) -> dict[tuple[int, int], Image.Image]:
    """Pictures by their cells, out of a grid of them all that went through WebP."""
    width, height = (max(sizes) for sizes in zip(*(picture.size for picture in pictures.values()), strict=True))
    grid = Image.new("RGB", (shape[1] * width, shape[0] * height))
    corners = {(row, column): (column * width, row * height) for row, column in pictures}
    for cell, picture in pictures.items():
        grid.paste(picture, corners[cell])
    grid = _reencoded(grid, "WEBP")
    return {
        cell: grid.crop((*corners[cell], corners[cell][0] + picture.width, corners[cell][1] + picture.height))
        for cell, picture in pictures.items()
    }


def _reencoded(picture: Image.Image, format: str) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, format)
    with Image.open(buffer) as opened:
        return opened.convert("RGB")
