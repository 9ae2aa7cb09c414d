"""Result folders as `lightning run evaluate` leaves them: `result.json` and `prompts.jsonl`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from zimage_lit.errors import UserError
from zimage_lit.files import parse_json, read_json

RESULT_KEYS = (
    "benchmark",
    "language",
    "title",
    "model",
    "pictures",
    "slice",
    "scores",
    "judges",
    "comparable",
    "versions",
)
PROMPT_KEYS = ("prompt_id", "prompt", "group", "score", "images", "verdicts", "judgements")
WAY_OUT = "name the folder of a finished evaluation, or evaluate again"
Prompt = Mapping[str, Any]  # a line of prompts.jsonl


@dataclass(frozen=True)
class Result:
    """One model on one benchmark, in one language."""

    folder: Path
    result: Mapping[str, Any]  # result.json
    prompts: Sequence[Prompt]  # lines of prompts.jsonl, in the plan's order

    @property
    def key(self) -> str:
        """The benchmark and, where it has several, the language: longtext-en, say."""
        return "-".join(filter(None, (self.result["benchmark"], self.result["language"])))

    @property
    def model(self) -> str:
        return str(self.result["model"])

    def examples(self, most: int = 10) -> list[Prompt]:
        """The first prompt of each group, of `most` groups."""
        found: dict[str, Prompt] = {}
        for line in self.prompts:
            found.setdefault(line["group"], line)
        return list(found.values())[:most]

    def first_pictures(self, lines: Sequence[Prompt]) -> dict[str, Image.Image]:
        """By prompt: the first picture of each of these lines that has one."""
        found = {line["prompt"]: self.picture(line["images"][0]) for line in lines}
        return {prompt: picture for prompt, picture in found.items() if picture is not None}

    def picture(self, image: Mapping[str, Any]) -> Image.Image | None:
        """One of a prompt's `images`, RGB, cut out of its grid; None where it is lost, or its file is there no more."""
        if image.get("lost"):
            return None
        try:
            with Image.open(self.folder / image["file"]) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, SyntaxError, ValueError):
            return None
        row, column, rows, columns = image.get("cell", (0, 0, 1, 1))
        width, height = picture.width // columns, picture.height // rows
        return picture.crop((column * width, row * height, (column + 1) * width, (row + 1) * height))


def read_results(folders: Sequence[Path]) -> list[Result]:
    """The results of all folders, in order; UserError for a folder without, and for two of one model on a benchmark."""
    if not folders:
        raise UserError("A report needs at least one result folder.")
    results = [read_result(Path(folder)) for folder in folders]
    seen: dict[tuple[str, str], Path] = {}
    for result in results:
        if (place := (result.key, result.model)) in seen:
            raise UserError(
                f"{seen[place]} and {result.folder} are both {result.key} of a model called {result.model!r}: evaluate "
                "one of them again with another name=…, or leave it out."
            )
        seen[place] = result.folder
    return results


def read_result(folder: Path) -> Result:
    """One folder; UserError that names the file, the line and the key that is not there."""
    result = read_json(folder / "result.json", WAY_OUT)
    check_keys(result, RESULT_KEYS, str(folder / "result.json"))
    path = folder / "prompts.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {WAY_OUT}.") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if line:
            place = f"{path}, line {number},"
            prompts.append(parse_json(line, place, WAY_OUT))
            check_keys(prompts[-1], PROMPT_KEYS, place)
    return Result(folder, result, prompts)


def check_keys(found: Mapping[str, Any], keys: Sequence[str], place: str) -> None:
    for key in keys:
        if key not in found:
            raise UserError(f"{place} has no {key!r}: {WAY_OUT}.")
