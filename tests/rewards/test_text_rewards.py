"""The score of text that was read, against a slow twin and cases worked out by hand; the reader is played."""

import random
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from zimage_lit.errors import UserError
from zimage_lit.rewards import RewardSet, text
from zimage_lit.rewards.text import OCRReward, edit_distance, lines_score, text_score, wanted_texts


def test_the_edit_distance_is_that_of_its_definition() -> None:
    @cache
    def slow(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        replaced = slow(one[1:], other[1:]) + (one[0] != other[0])
        return min(slow(one[1:], other) + 1, slow(one, other[1:]) + 1, replaced)

    rng = random.Random(0)
    for _ in range(200):
        one, other = ("".join(rng.choices("ABC", k=rng.randrange(7))) for _ in range(2))
        assert edit_distance(one, other) == slow(one, other)


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("OPEN", "OPEN", 1),
        ("OPAN", "OPEN", 0.75),
        ("OPE", "OPEN", 0.75),
        ("", "OPEN", 0),
        ("OPEN NOW", "OPEN", 0.25),  # extra text is no gain: as a substring it would count as right
        ("OPEN OPEN OPEN", "OPEN", 0),
        ("O P E N", "OPEN", 1),
        ("open", "OPEN", 0),
        ("今日营业", "今日营业", 1),
    ],
)
def test_one_text(read: str, wanted: str, score: float) -> None:
    assert text_score(read, wanted) == score


def test_case_may_be_ignored_and_an_empty_wish_is_refused() -> None:
    assert text_score("oPEn", "OPEN", ignore_case=True) == 1
    with pytest.raises(ValueError, match="has no characters"):
        text_score("x", " ")


@pytest.mark.parametrize(
    ("lines", "wanted", "score"),
    [
        (["B", "A"], ["A", "B"], 1),  # order means nothing
        (["HELLO", "WORLD"], ["HELLO WORLD"], 1),  # one text over two lines
        (["SALE"], ["SALE", "50"], 4 / 6),
        (["SALE", "50", "XYZ"], ["SALE", "50"], 0.5),  # three characters too many, of six
        (["AB"], ["AB", "AB"], 0.5),
        ([], ["AB"], 0),
        (["QQQQQQQQQQ"], ["AB"], 0),
    ],
)
def test_several_lines_and_texts(lines: list[str], wanted: list[str], score: float) -> None:
    assert lines_score(lines, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prompt", "metadata", "wanted"),
    [
        ('a sign that says "OPEN" and “NOW”', {}, ["OPEN", "NOW"]),
        ('a "sign"', {"text": "CLOSED"}, ["CLOSED"]),
        ("a poster", {"texts": ["A", " ", "B"]}, ["A", "B"]),
        ("一块写着「营业」的牌子", {}, ["营业"]),
        ("a cat", {}, []),
    ],
)
def test_what_is_wanted_comes_from_the_metadata_or_the_quotation_marks(prompt: str, metadata: Any, wanted: Any) -> None:
    assert wanted_texts(prompt, metadata) == wanted


def test_the_reward_reads_every_picture_and_drops_unsure_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Player:
        """Reads the red value of the first pixel as the number of a text."""

        def __init__(self, who: str, options: Any) -> None:
            assert (who, options) == ("the reward ocr", {"Rec.model_path": "reader.onnx"})

        def read(self, image: Any) -> Any:
            known = {1: [("OPEN", 0.9), ("dust", 0.2)], 2: [("OPAN", 0.8)], 3: []}
            return known[np.asarray(image)[0, 0, 0]]

    monkeypatch.setattr(text, "TextReader", Player)
    images = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (1, 2, 3, 1)]
    reward = OCRReward(options={"Rec.model_path": "reader.onnx"})
    scores = RewardSet([reward]).score(images, ['a sign "OPEN"'] * 3 + ["a cat"])["ocr"]
    assert scores[:3].tolist() == [1, 0.75, 0] and scores[3].isnan()


def test_without_the_reader_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"RapidOCR .*pip install 'zimage-lit\[ocr\]'"):
        OCRReward().prepare("cpu")
