"""The judges that read: RapidOCR as it is installed, PaddleOCR 2.10 played by its interface."""

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from evaluation.benchmarks import longtext
from evaluation.judges import ocr
from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.judges.ocr import PADDLE_FILES, PADDLE_MODELS, OCRAsVLM, PaddleReader, RapidOCRReader
from zimage_lit.errors import UserError

RED = Image.new("RGB", (4, 2), (255, 0, 0))


class Played:
    """A judge of role ocr that reads the width of a picture in as many lines as it is high, less one."""

    def record(self) -> JudgeRecord:
        return JudgeRecord("Played", "lines", "1", "it plays", {"a": 1}, {"library": "2"})

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        pictures = [question.pictures[0] for question in asked]
        line = {"confidence": 1.0}
        return [{"lines": [{"text": str(p.width), **line}] * (p.height - 1)} for p in pictures]


def test_rapidocr_reads_lines_and_leaves_out_those_that_it_is_unsure_of() -> None:
    pytest.importorskip("rapidocr", reason="RapidOCR is not installed: pip install 'zimage-lit[ocr]'")
    picture = Image.new("RGB", (400, 400), "white")
    for row, text in enumerate(("Coffee", "Since 1998")):
        ImageDraw.Draw(picture).text((16, 80 + 120 * row), text, font=ImageFont.load_default(64), fill="black")
    reader = RapidOCRReader()
    (judgement,) = reader.judge([Asked((picture,), {})])
    assert [line["text"] for line in judgement["lines"]] == ["Coffee", "Since 1998"]
    assert RapidOCRReader(min_confidence=1.01).judge([Asked((picture,), {})]) == [{"lines": []}]
    record = reader.record()
    assert record.model.startswith("RapidOCR ") and "PaddleOCR" in record.differs and record.versions["rapidocr"]
    assert record.settings == {"min_confidence": 0.5, "options": {}}


def test_without_rapidocr_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"the judge RapidOCRReader .*pip install 'zimage-lit\[ocr\]'"):
        RapidOCRReader().record()


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for name in PADDLE_MODELS.values():
        (tmp_path / name).mkdir()
        for file in PADDLE_FILES:
            (tmp_path / name / file).write_text(name)
    return [str(tmp_path / PADDLE_MODELS[part]) for part in ("det", "rec", "cls")]


def play_paddle(monkeypatch: pytest.MonkeyPatch, version: str, pages: list[Any]) -> list[Any]:
    """PaddleOCR 2's interface; returns the settings and the pixels that it has been given."""
    given: list[Any] = []

    class PaddleOCR:
        def __init__(self, **settings: Any) -> None:
            given.append(settings)

        def ocr(self, pixels: np.ndarray, cls: bool) -> list[Any]:
            assert cls
            given.append(pixels)
            return pages

    monkeypatch.setitem(sys.modules, "paddleocr", types.SimpleNamespace(PaddleOCR=PaddleOCR, __version__=version))
    return given


def test_paddleocr_is_called_as_the_benchmark_calls_it(monkeypatch: pytest.MonkeyPatch, folders: list[str]) -> None:
    box = [[0.0, 0.0], [9.0, 0.0], [9.0, 9.0], [0.0, 9.0]]
    given = play_paddle(monkeypatch, "2.10.0", [[[box, ("SALE", 0.875)], [box, ("50% off", 0.5)]], None])
    reader = PaddleReader(*folders)
    lines = [{"text": "SALE", "confidence": 0.875}, {"text": "50% off", "confidence": 0.5}]
    assert reader.judge([Asked((RED,), {}), Asked((RED,), {})]) == [{"lines": lines}] * 2
    settings, pixels, _ = given
    models = {"det_model_dir": folders[0], "rec_model_dir": folders[1], "cls_model_dir": folders[2]}
    assert settings == {"use_angle_cls": True, "lang": "en", "show_log": False, **models}
    assert pixels.shape == (2, 4, 3) and pixels[0, 0].tolist() == [0, 0, 255]  # blue first


def test_a_page_without_text_has_no_lines(monkeypatch: pytest.MonkeyPatch, folders: list[str]) -> None:
    play_paddle(monkeypatch, "2.10.0", [None])
    assert PaddleReader(*folders).judge([Asked((RED,), {})]) == [{"lines": []}]


def test_paddleocr_is_official_with_its_version_and_models(
    monkeypatch: pytest.MonkeyPatch, folders: list[str], tmp_path: Path
) -> None:
    play_paddle(monkeypatch, "2.10.3", [])
    official = PaddleReader(*folders).record()
    assert official.differs == "" and PADDLE_MODELS["rec"] in official.model
    other = tmp_path / "ch_PP-OCRv4_rec_infer"
    Path(folders[1]).rename(other)
    record = PaddleReader(folders[0], str(other), folders[2]).record()
    assert record.differs == "The model ch_PP-OCRv4_rec_infer stands in place of en_PP-OCRv4_rec_infer."
    play_paddle(monkeypatch, "2.9.1", [])
    assert PaddleReader(folders[0], str(other), folders[2]).record().differs.startswith("PaddleOCR 2.9.1 reads in")


def test_paddleocr_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, folders: list[str]) -> None:
    reader = PaddleReader(*folders)
    play_paddle(monkeypatch, "3.2.0", [])
    with pytest.raises(UserError, match=r"PaddleOCR 2.10, and 3.2.0 is installed"):
        reader.record()
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    with pytest.raises(UserError, match=r"pip install 'zimage-lit\[paddle\]'"):
        reader.record()
    play_paddle(monkeypatch, "2.10.0", [])
    (Path(folders[1]) / "inference.pdiparams").unlink()
    with pytest.raises(UserError, match=r"en_PP-OCRv4_rec_infer holds no inference.pdiparams"):
        reader.judge([Asked((RED,), {})])  # before PaddleOCR would download it


def test_an_ocr_reader_answers_reading_questions_in_a_language_models_place() -> None:
    judge = OCRAsVLM(Played())
    question = {"prompt": longtext.QUESTION, "max_new_tokens": 4}
    sizes = ((5, 3), (7, 1))
    answers = judge.judge([Asked((Image.new("RGB", size),), question) for size in sizes])
    assert answers == [{"answer": "5\n5"}, {"answer": "No text recognized."}]
    assert longtext.clean(answers[1]["answer"], "official") == ""
    record = judge.record()
    assert record.settings == {"reader": "Played", "a": 1} and "Qwen2.5-VL-7B-Instruct" in record.differs
    with pytest.raises(UserError, match=r"can read, but not answer 'Is it red\?'.*judges.vlm"):
        judge.judge([Asked((RED,), {"prompt": "Is it red?", "max_new_tokens": 4})])


def test_ocr_readers_are_rapidocr_unless_others_are_named() -> None:
    assert isinstance(OCRAsVLM().reader, RapidOCRReader)
    assert ocr.NO_TEXT in longtext.NO_TEXT and longtext.QUESTION.startswith(ocr.READING_QUESTION)
