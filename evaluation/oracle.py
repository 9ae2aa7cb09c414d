"""Pages with exactly the text that a prompt asks for: what a benchmark that reads scores on them is what its reader
can read.

A page is black letters on white, a text a paragraph, as large as fits. Its letters swapped, it is what a model draws
that cannot spell; the score must fall by what was swapped, and a blank page must score nothing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from evaluation.benchmarks import cvtg2k, longtext
from evaluation.judges.contract import Asked, Judge
from evaluation.judges.ocr import OCRAsVLM
from zimage_lit.errors import UserError

FONT_FILES = (  # where systems put Noto Sans CJK
    "/usr/share/fonts/opentype/noto/NotoSansCJK-Regular.ttc",  # Debian, Ubuntu: fonts-noto-cjk
    "/usr/share/fonts/noto-cjk/NotoSansCJK-Regular.ttc",  # Arch: noto-fonts-cjk
    "/usr/share/fonts/google-noto-sans-cjk-fonts/NotoSansCJK-Regular.ttc",  # Fedora: google-noto-sans-cjk-fonts
)
SIMPLIFIED_CHINESE = 2  # its place in the collection
SIZE = 1024  # pixels a side
MARGIN = 48  # pixels
LARGEST, SMALLEST = 64, 16  # size of the letters, in pixels
LINE_HEIGHT, PARAGRAPH_GAP = 1.5, 0.5  # in sizes of the letters
CHINESE = re.compile("[\u4e00-\u9fa5]")
WORD = re.compile("[A-Za-z0-9]+")
_WIDE = "\u3000-\u303f\u4e00-\u9fff\uff00-\uffef"  # Chinese letters and marks
UNBROKEN = re.compile(rf"[{_WIDE}]|[^\s{_WIDE}]+|\s+")  # what a line does not end within


class OracleScore(NamedTuple):
    """A benchmark's `overall` on pages: through the reader, and had it read all that stands there."""

    measured: float
    expected: float


def oracle_score(
    prompts: Sequence[Mapping[str, Any]], texts: Sequence[Sequence[str]], reader: Judge, font: str
) -> OracleScore:
    """Draws a page for each prompt of CVTG-2K or LongText-Bench, has it read, and scores it as the benchmark does.

    texts: what stands on each page; `wanted_texts` of its prompt, or something else.   reader: a judge of role ocr.
    """
    read = reading_of(prompts[0], [page(lines, font) for lines in texts], reader)
    return OracleScore(_overall(prompts, read), _overall(prompts, texts))


def reading_of(prompt: Mapping[str, Any], pages: Sequence[Image.Image], reader: Judge) -> list[list[str]]:
    """The lines on each page, read in the role in which the prompt's benchmark has pictures read."""
    if "ocr_gt" not in prompt:
        judgements = reader.judge([Asked((picture,), {}) for picture in pages])
        return [[line["text"] for line in found["lines"]] for found in judgements]
    question = {"prompt": longtext.QUESTION, "max_new_tokens": longtext.MAX_NEW_TOKENS}
    answers = OCRAsVLM(reader).judge([Asked((picture,), question) for picture in pages])
    return [found["answer"].splitlines() for found in answers]


def wanted_texts(prompt: Mapping[str, Any]) -> list[str]:
    """What a prompt of LongText-Bench lists, and one of CVTG-2K has in single quotation marks."""
    return list(prompt["ocr_gt"]) if "ocr_gt" in prompt else re.findall("'(.*?)'", prompt["prompt"])


def _overall(prompts: Sequence[Mapping[str, Any]], read: Sequence[Sequence[str]]) -> float:
    pairs = list(zip(prompts, read, strict=True))
    if "ocr_gt" in prompts[0]:
        return longtext.score([{**prompt, "answer": "\n".join(lines)} for prompt, lines in pairs])["overall"]
    return cvtg2k.score([{**prompt, "ocr_lines": lines} for prompt, lines in pairs])["overall"]


def find_font(file: str | None = None) -> str:
    """The font file with Latin and Chinese letters: the one given, else Noto Sans CJK where the system keeps it.

    UserError where there is none.
    """
    if file is not None and not Path(file).is_file():
        raise UserError(f"there is no font {file}: check the path.")
    found = next((place for place in (file, *FONT_FILES) if place and Path(place).is_file()), None)
    if found is None:
        raise UserError(
            "there is no font with Chinese letters: install Noto Sans CJK (Debian: apt-get install fonts-noto-cjk), or "
            "name a font file."
        )
    return found


def page(texts: Sequence[str], font: str, size: int = SIZE) -> Image.Image:
    """The texts as paragraphs on a white square page, RGB; the letters as large as all fit, from 64 down to 16 pixels.

    Lines break between words, in Chinese between any two letters. ValueError for texts that do not fit.
    """
    for height in range(LARGEST, SMALLEST - 1, -2):
        letters = _letters(font, height)
        lines = [wrapped(text, letters, size - 2 * MARGIN) for text in texts]
        wide = max((letters.getlength(line) for paragraph in lines for line in paragraph), default=0)
        needed = LINE_HEIGHT * sum(map(len, lines)) + PARAGRAPH_GAP * max(len(lines) - 1, 0)
        if wide <= size - 2 * MARGIN and needed * height <= size - 2 * MARGIN:
            return _drawn(lines, letters, height, size)
    raise ValueError(f"{sum(map(len, texts))} letters do not fit on a page of {size} pixels.")


def blank(size: int = SIZE) -> Image.Image:
    """A page without text."""
    return Image.new("RGB", (size, size), "white")


def swapped(text: str, alphabet: Sequence[str] = ()) -> str:
    """The text misspelt: in its words every two neighbouring letters change places (`Coffee` -> `oCffee`).

    Where a benchmark counts Chinese letters in any order, changing places changes nothing: every second Chinese letter
    becomes the one after it in the `alphabet` (see `chinese_letters`), if there is one.
    """
    text = WORD.sub(lambda word: re.sub("(.)(.)", r"\2\1", word.group()), text)
    if not alphabet:
        return text
    following = dict(zip(alphabet, [*alphabet[1:], alphabet[0]], strict=True))
    found = list(text)
    for place in [place for place, letter in enumerate(found) if CHINESE.match(letter)][::2]:
        found[place] = following[found[place]]
    return "".join(found)


def chinese_letters(texts: Iterable[str]) -> list[str]:
    """All Chinese letters of some texts, each once, in order."""
    return sorted({letter for text in texts for letter in CHINESE.findall(text)})


def wrapped(text: str, letters: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text in lines of at most `width` pixels, but for single words that are wider."""
    lines = [""]
    for piece in UNBROKEN.findall(text):
        if letters.getlength((lines[-1] + piece).rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return [line.rstrip() for line in lines if line.strip()]


@lru_cache(maxsize=64)
def _letters(font: str, height: int) -> ImageFont.FreeTypeFont:
    place = SIMPLIFIED_CHINESE if font.endswith(".ttc") else 0
    return ImageFont.truetype(font, height, index=place)


def _drawn(paragraphs: Sequence[Sequence[str]], letters: ImageFont.FreeTypeFont, height: int, size: int) -> Image.Image:
    drawing = ImageDraw.Draw(picture := blank(size))
    y = float(MARGIN)
    for lines in paragraphs:
        for line in lines:
            drawing.text((MARGIN, y), line, font=letters, fill="black")
            y += LINE_HEIGHT * height
        y += PARAGRAPH_GAP * height
    return picture
