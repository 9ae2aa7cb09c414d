"""What the benchmarks' protocols share: official files read and checked, the plan of what has to be drawn, and what is
asked about the pictures."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from zimage_lit.errors import UserError


@dataclass(frozen=True)
class OfficialFolder:
    """A benchmark's official files: where they come from, and the SHA-256 of each by its name in the folder."""

    benchmark: str
    source: str  # where a person gets the files: address and commit
    sha256: Mapping[str, str]

    def read(self, data_dir: str | Path, name: str) -> bytes:
        """The contents of one file; UserError that names it, and where to get it, when it is absent or altered."""
        data = self.read_unchecked(data_dir, name)
        self.check(Path(data_dir) / name, hashlib.sha256(data).hexdigest(), self.sha256[name], "SHA-256")
        return data

    def read_unchecked(self, data_dir: str | Path, name: str) -> bytes:
        """The contents of a file whose checksum is taken over more than itself; UserError when it is absent."""
        path = Path(data_dir) / name
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{path}, a file of {self.benchmark}, cannot be read ({error.strerror}): get it from {self.source}."
            ) from None

    def check(self, path: Path, found: str, expected: str, kind: str) -> None:
        """UserError when the checksum of what stands at `path` is not the official one's."""
        if found != expected:
            raise UserError(
                f"{path} is not the official file of {self.benchmark}: its {kind} is {found}, not {expected}; get it "
                f"anew from {self.source}."
            )

    def check_number(self, data_dir: str | Path, found: int, expected: int) -> None:
        """UserError when the files under `data_dir` do not hold as many prompts as the benchmark has."""
        if found != expected:
            raise UserError(
                f"{data_dir} holds {found} prompts of {self.benchmark}, which has {expected}: get its files "
                f"from {self.source}."
            )


@dataclass(frozen=True)
class PlannedImage:
    """One picture that a benchmark asks for: what to draw, from which noise, and how its file is called."""

    prompt_id: str  # of its prompt, one in the benchmark and language; results name what is lost by it
    image: int  # which of its prompt's pictures, from 0
    prompt: str  # the text as the official file has it
    seed: int  # seed of the generator that its noise comes from,
    draw: int  # and which of the noises drawn from that generator one after the other, from 0
    width: int  # pixels
    height: int
    official_file: str  # where the benchmark's own tools look for it
    cell: tuple[int, int] | None = None  # (row, column) of a grid of pictures that the official file is, if it is one
    official_pattern: str = ""  # of the prompt's files, where the benchmark's own tools take any that fit, in order

    @property
    def file(self) -> str:
        """Its own lossless file, in a folder for the benchmark and language: `<prompt id>/<image>.png`."""
        return f"{self.prompt_id}/{self.image}.png"


class Question(NamedTuple):
    """What a judge is asked about a prompt's pictures.

    role, question: as `evaluation.judges.contract` has them.   pictures: which of the prompt's, from 0.
    """

    role: str
    pictures: tuple[int, ...]
    question: Mapping[str, Any]


class Judged(NamedTuple):
    """A question, and what the judge said to it; None where one of its pictures is lost."""

    question: Question
    judgement: Mapping[str, Any] | None


Judgements = Sequence[Judged]  # of a prompt's questions, in their order, without those whose role has no judge
Lost = Mapping[int, str]  # picture -> why it is missing or broken


def answers_of_pictures(numbers: Sequence[str], said: Judgements) -> list[dict[str, str] | None]:
    """A prompt's answers, picture after picture, by the numbers of its questions; None for a picture that is lost.

    said: to the first question about the first picture, to the second one about it, and so on.
    """
    pictures = [said[start : start + len(numbers)] for start in range(0, len(said), len(numbers))]
    return [
        {number: one.judgement["answer"] for number, one in zip(numbers, picture, strict=True) if one.judgement} or None
        for picture in pictures
    ]


def cells(columns: int, number: int) -> Iterator[tuple[int, int]]:
    """(row, column) of `number` pictures in a grid, row by row."""
    return (divmod(image, columns) for image in range(number))


def language_of(benchmark: str, language: str) -> str:
    """The language in small letters; UserError for any but "en" and "zh"."""
    if language.lower() not in ("en", "zh"):
        raise UserError(f"{benchmark} comes in the languages en and zh, not {language!r}.")
    return language.lower()
