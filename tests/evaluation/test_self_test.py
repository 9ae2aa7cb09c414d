"""The self-test passes here, and tells what is wrong where something is."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import BENCHMARKS

from evaluation import self_test as tested
from evaluation.self_test import BY_HAND, FILES, judge_tinyworld, self_test
from zimage_lit.errors import UserError


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the slow reading of pictures, which has a test of its own."""
    monkeypatch.setattr(tested, "read_as", lambda picture, text: text)
    monkeypatch.setattr(tested, "find_font", lambda: None)
    monkeypatch.setattr(tested, "page", lambda *given: None)


def states(printed: str) -> dict[str, str]:
    lines = [line for line in printed.splitlines()[:-2] if line]
    return {line[9:].split(": ")[0]: line[:8].strip() for line in lines}


def test_scoring_and_judging_work_here(unread: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert self_test(None) == 0
    printed = capsys.readouterr().out
    found = states(printed)
    assert {name for name, state in found.items() if state == "skipped"} == {f"{n}, published vectors" for n in FILES}
    assert {state for name, state in found.items() if "published" not in name} == {"ok"}
    assert len(found) == len(BY_HAND) + len(FILES) + 3
    assert printed.endswith("\n8 ok, 0 failed, 6 skipped\n")


def test_the_published_vectors_are_scored_where_they_are_named(
    unread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (BENCHMARKS / "golden").is_dir():
        pytest.skip(f"there is no {BENCHMARKS / 'golden'}: name the folder of the golden vectors")
    assert self_test(BENCHMARKS / "golden") == 0
    assert set(states(capsys.readouterr().out).values()) == {"ok"}


def test_a_wrong_score_and_a_missing_file_fail(
    unread: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {"set": "CVTG", "area": 2, "index": 0, "gt_words": ["a"], "ocr_lines": ["a"], "correct_words": 0}
    (tmp_path / "cvtg2k").mkdir()
    (tmp_path / FILES["CVTG-2K"]).write_text(json.dumps({"cases": [case]}))
    monkeypatch.setattr(tested.dpg, "holding", lambda dependency, scores: dict(scores))
    assert self_test(tmp_path) == 1
    printed = capsys.readouterr().out
    found = states(printed)
    assert {name for name, state in found.items() if state == "failed"} == {
        "DPG-Bench, scored by hand",
        *(f"{name}, published vectors" for name in FILES),
    }
    assert "CVTG-2K, published vectors: ValueError: correct_words of case 0 is 1, and should be 0" in printed
    assert "dpg (official) is 0.6666" in printed and "FileNotFoundError" in printed
    assert printed.endswith("\n7 ok, 7 failed, 0 skipped\n")


def test_what_is_not_installed_is_skipped_with_the_way_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent() -> Any:
        raise UserError("install it with pip install 'zimage-lit[ocr]'.")

    monkeypatch.setattr(tested, "checks", lambda golden: [("OCR reads English", absent)])
    assert self_test(None) == 0
    assert "skipped  OCR reads English: install it with pip install 'zimage-lit[ocr]'." in capsys.readouterr().out


def test_a_reader_that_is_installed_and_does_not_work_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise UserError("the model's file is damaged.")

    monkeypatch.setattr(tested.RapidOCRReader, "record", lambda _: None)
    monkeypatch.setattr(tested.RapidOCRReader, "judge", broken)
    with pytest.raises(RuntimeError, match="damaged"):
        tested.read_english()


def test_the_embedded_reader_reads_english_and_chinese() -> None:
    pytest.importorskip("rapidocr", reason="RapidOCR is not installed: pip install 'zimage-lit[ocr]'")
    assert tested.read_english().startswith("OPEN 24 HOURS (RapidOCR")
    try:
        assert tested.read_chinese().startswith("今日营业")
    except UserError as error:
        pytest.skip(str(error))


def test_a_verifier_that_sees_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind:
        def judge(self, asked: Any) -> Any:
            return [{"detections": [], "read": None, "correct": False} for _ in asked]

    monkeypatch.setattr(tested, "TinyWorldVerifier", Blind)
    with pytest.raises(ValueError, match="right among drawn is 0, and should be 21"):
        judge_tinyworld()
