"""RapidOCR as it is installed: what it reads, and which options it refuses. Skipped where it is not installed."""

from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

from zimage_lit.components.text_reader import TextReader
from zimage_lit.errors import UserError

pytest.importorskip("rapidocr", reason="RapidOCR is not installed: pip install 'zimage-lit[ocr]'")


def test_it_reads_a_line_and_nothing_on_an_empty_page() -> None:
    picture = Image.new("RGB", (400, 400), "white")
    reader = TextReader("the test", {})
    assert reader.read(picture) == []
    ImageDraw.Draw(picture).text((24, 160), "Open 24", font=ImageFont.load_default(64), fill="black")
    ((text, confidence),) = reader.read(picture)
    assert text == "Open 24" and 0.8 < confidence <= 1


def test_its_own_models_have_checksums_and_given_ones_are_files(tmp_path: Path) -> None:
    (tmp_path / "reader.onnx").touch()
    own = TextReader("the test", {}).models()
    given = TextReader("the test", {"Rec.model_path": str(tmp_path / "reader.onnx")}).models()
    assert all(isinstance(checksum, str) and len(checksum) == 64 for checksum in own.values())
    assert given == {**own, "Rec": tmp_path / "reader.onnx"}


def test_models_can_be_chosen_by_their_names() -> None:
    chosen = {"Rec.ocr_version": "PP-OCRv4", "Rec.model_type": "mobile", "Rec.lang_type": "en"}
    reader = TextReader("the test", chosen)
    assert reader.name() == "RapidOCR PP-OCRv4 mobile"
    assert reader.models()["Rec"] != TextReader("the test", {}).models()["Rec"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"Rec.modle_path": "x"}, "has no option Rec.modle_path"),
        ({"model_path": "x"}, "has no option model_path"),
        ({"Eyes.model_path": "x"}, "has no option Eyes.model_path"),
        ({"Rec.model_path": "missing.onnx"}, "no file missing.onnx, which the option Rec.model_path names"),
        ({"Rec.ocr_version": "PP-OCRv0"}, "does not take the options"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=f"the test: .*{message}"):
        TextReader("the test", options)
