"""Pages of text: what stands on them, and that the embedded OCR reads it, a prompt a benchmark.

`benchmarks/oracle.py` does a hundred.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from benchmark_files import official
from PIL import Image

from evaluation.benchmarks import cvtg2k, longtext
from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.judges.ocr import RapidOCRReader
from evaluation.oracle import (
    FONT_FILES,
    MARGIN,
    _letters,
    blank,
    chinese_letters,
    find_font,
    oracle_score,
    page,
    swapped,
    wanted_texts,
    wrapped,
)
from zimage_lit.errors import UserError


@pytest.fixture(scope="module")
def font() -> str:
    try:
        return find_font()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def reader() -> RapidOCRReader:
    pytest.importorskip("rapidocr", reason="RapidOCR is not installed: pip install 'zimage-lit[ocr]'")
    return RapidOCRReader()


def prompts_of(name: str) -> list[dict[str, Any]]:
    if name == "cvtg2k":
        return cvtg2k.prompts(official(name))
    return longtext.prompts(official("longtext"), name.removeprefix("longtext-"))


class Recorded:
    """Plays a reader of role ocr by a list of what it reads."""

    def __init__(self, pages: Sequence[Sequence[str]]) -> None:
        self.pages = pages

    def record(self) -> JudgeRecord:
        return JudgeRecord("Recorded", "recorded", "", "")

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        assert len(asked) == len(self.pages)
        return [{"lines": [{"text": text, "confidence": 1.0} for text in lines]} for lines in self.pages]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Coffee", "oCffee"), ("Open 24/7!", "pOne 42/7!"), ("A is for cats", "A si ofr acst"), ("READ", "ERDA")],
)
def test_swapping_exchanges_neighbouring_letters_of_each_word(text: str, expected: str) -> None:
    assert swapped(text) == expected


def test_every_second_chinese_letter_becomes_the_next_of_the_alphabet() -> None:
    assert chinese_letters(["乙甲，乙", "丙"]) == sorted("甲乙丙")
    assert swapped("甲乙，丙甲 ab", "甲乙丙") == "乙乙，甲甲 ba"
    assert swapped("甲乙丙") == "甲乙丙"


def test_texts_are_those_that_the_benchmarks_score() -> None:
    prompt = {"prompt": "A sign 'Open Daily' and a door 'PUSH'."}
    assert wanted_texts(prompt) == ["Open Daily", "PUSH"]
    assert " ".join(wanted_texts(prompt)).lower().split() == cvtg2k.wanted_words(prompt["prompt"])
    assert wanted_texts({"prompt": "…", "ocr_gt": ["one", "two"]}) == ["one", "two"]


def test_lines_break_between_words_and_chinese_letters_and_lose_nothing(font: str) -> None:
    letters = _letters(font, 32)
    text = "Step back in time, and explore 历史每个角落的2023年4月14日 – history"
    lines = wrapped(text, letters, 200)
    assert len(lines) > 3 and all(letters.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    whole = [word for word in text.split() if word.isascii()]
    assert all(any(word in line.split() for line in lines) for word in whole)


def test_pages_fill_their_margins_and_no_more(font: str) -> None:
    def ink(picture: Image.Image) -> np.ndarray:
        rows, columns = np.nonzero(np.asarray(picture.convert("L")) < 128)
        return np.array([columns.min(), rows.min(), columns.max(), rows.max()])

    few, many = ink(page(["OPEN"], font)), ink(page(["many words " * 60], font))
    for found in (few, many):
        assert (found[:2] >= MARGIN).all() and (found[2:] < 1024 - MARGIN).all()
    assert many[3] > 600 > few[3]
    assert np.asarray(blank(64)).min() == 255
    with pytest.raises(ValueError, match="do not fit on a page of 200 pixels"):
        page(["too many words " * 20], font, 200)


def test_a_font_is_found_or_the_way_to_it_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"there is no font nowhere.ttc"):
        find_font("nowhere.ttc")
    monkeypatch.setattr("evaluation.oracle.FONT_FILES", (str(tmp_path / "a.ttc"),))
    with pytest.raises(UserError, match="apt-get install fonts-noto-cjk"):
        find_font()
    (tmp_path / "a.ttc").touch()
    assert find_font() == str(tmp_path / "a.ttc")
    assert FONT_FILES[0].startswith("/usr/share/fonts/")


def test_the_oracles_scores_are_the_benchmarks_own(font: str) -> None:
    place = {"set": "CVTG", "area": 2, "index": 0}
    prompts = [{**place, "prompt": "'FREE TEA' and 'OPEN'"}]
    read = oracle_score(prompts, [["FREE TEA", "OPEN"]], Recorded([["free", "OPEN"]]), font)
    assert read.measured == pytest.approx(2 / 3) and read.expected == 1
    texts = {"mode": "zh", "prompt_id": 1, "category": "sign", "length": "short", "ocr_gt": ["今日营业"]}
    read = oracle_score([texts], [["今天营业"]], Recorded([["今天"]]), font)
    assert read == (0.25, 0.75)


@pytest.mark.parametrize(("name", "bar"), [("cvtg2k", 0.97), ("longtext-en", 0.95), ("longtext-zh", 0.95)])
def test_the_embedded_ocr_reads_what_stands_there(name: str, bar: float, font: str, reader: RapidOCRReader) -> None:
    prompts = [prompts_of(name)[place] for place in (3, 7)]
    score = oracle_score(prompts, [wanted_texts(prompt) for prompt in prompts], reader, font)
    assert score.expected == 1 and score.measured >= bar


@pytest.mark.parametrize("name", ["cvtg2k", "longtext-en", "longtext-zh"])
def test_the_embedded_ocr_mends_no_spelling(name: str, font: str, reader: RapidOCRReader) -> None:
    prompt = prompts_of(name)[3]
    texts = wanted_texts(prompt)
    score = oracle_score([prompt], [[swapped(text, chinese_letters(texts)) for text in texts]], reader, font)
    assert score.expected < 0.8 and abs(score.measured - score.expected) < 0.1


@pytest.mark.parametrize("name", ["cvtg2k", "longtext-en"])
def test_a_blank_page_scores_nothing(name: str, font: str, reader: RapidOCRReader) -> None:
    assert oracle_score([prompts_of(name)[0]], [[]], reader, font) == (0, 0)
