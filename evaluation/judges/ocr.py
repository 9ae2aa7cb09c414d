"""Judges that read text: RapidOCR, which needs no download; PaddleOCR 2.10, CVTG-2K's own; and an OCR reader where a
benchmark asks a vision-language model to read.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.judges.contract import Asked, Judge, JudgeRecord
from evaluation.judges.weights import file_sha256, folder_revision, library_versions
from zimage_lit.components.text_reader import TextReader
from zimage_lit.errors import UserError

READING_QUESTION = "Recognize the text in the image"  # how the question of LongText-Bench and OneIG-Bench begins
NO_TEXT = "No text recognized."  # the answer that it wishes for where there is none
PADDLE_VERSION = "2.10."
PADDLE_MODELS = {  # the folders of PaddleOCR's English models, as it loads them itself for lang="en"
    "det": "en_PP-OCRv3_det_infer",
    "rec": "en_PP-OCRv4_rec_infer",
    "cls": "ch_ppocr_mobile_v2.0_cls_infer",
}
PADDLE_FILES = ("inference.pdmodel", "inference.pdiparams")  # of each; PaddleOCR would download what is missing


class RapidOCRReader:
    """Role ocr: RapidOCR with the Chinese and English models that come with it.

    min_confidence: lines that it is less sure of are not text, in [0, 1]; PaddleOCR has the same default.
    options: of RapidOCR, by the keys of its config.yaml, such as `Rec.model_path`.
    """

    def __init__(self, min_confidence: float = 0.5, options: dict[str, Any] | None = None) -> None:
        self.min_confidence = min_confidence
        self.options = options or {}
        self._reader: TextReader | None = None

    def record(self) -> JudgeRecord:
        """UserError where RapidOCR is not installed or does not know an option."""
        reader = self._loaded()
        models = {part: file_sha256(m) if isinstance(m, Path) else m for part, m in reader.models().items()}
        return JudgeRecord(
            judge=type(self).__name__,
            model=reader.name(),
            revision=" ".join(f"{part} {sha256[:16]}" for part, sha256 in models.items()),
            differs="RapidOCR reads in place of PaddleOCR 2.10.",
            settings={"min_confidence": self.min_confidence, "options": self.options},
            versions=library_versions("rapidocr", "onnxruntime", "opencv-python-headless"),
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        reader = self._loaded()
        read = [reader.read(question.pictures[0]) for question in asked]
        return [{"lines": lines_of(lines, self.min_confidence)} for lines in read]

    def _loaded(self) -> TextReader:
        if self._reader is None:
            self._reader = TextReader(f"the judge {type(self).__name__}", self.options)
        return self._reader


class PaddleReader:
    """Role ocr: PaddleOCR as CVTG-2K's evaluation calls it, its own judge with version 2.10 and its English models.

    detection, recognition, direction: folders of its inference models, as its makers' archives en_PP-OCRv3_det_infer,
        en_PP-OCRv4_rec_infer and ch_ppocr_mobile_v2.0_cls_infer unpack.

    Whether these are the official models is told by the folders' names, for no checksums of them are published.
    """

    def __init__(self, detection: str, recognition: str, direction: str) -> None:
        self.folders = {"det": Path(detection), "rec": Path(recognition), "cls": Path(direction)}
        self._engine: Any = None

    def record(self) -> JudgeRecord:
        """UserError where PaddleOCR 2 is not installed or a folder holds no model."""
        version = paddle_version()
        for folder in self.folders.values():
            for name in PADDLE_FILES:
                if not (folder / name).is_file():
                    raise UserError(
                        f"{folder} holds no {name}: unpack one of PaddleOCR's inference models there "
                        f"({', '.join(PADDLE_MODELS.values())})."
                    )
        return JudgeRecord(
            judge=type(self).__name__,
            model=f"PaddleOCR {' '.join(folder.name for folder in self.folders.values())}",
            revision=" ".join(f"{part} {folder_revision(folder)}" for part, folder in self.folders.items()),
            differs=self._difference(version),
            settings={"use_angle_cls": True, "lang": "en"},
            versions=library_versions("paddleocr", "paddlepaddle", "paddlepaddle-gpu"),
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        if self._engine is None:
            self._engine = self._load()
        return [{"lines": self._read(question)} for question in asked]

    def _load(self) -> Any:
        self.record()  # PaddleOCR would download what is missing
        from paddleocr import PaddleOCR

        folders = {f"{part}_model_dir": str(folder) for part, folder in self.folders.items()}
        return PaddleOCR(use_angle_cls=True, lang="en", show_log=False, **folders)

    def _read(self, question: Asked) -> list[dict[str, Any]]:
        pixels = np.ascontiguousarray(np.asarray(question.pictures[0])[:, :, ::-1])  # it takes blue first
        pages = self._engine.ocr(pixels, cls=True)
        lines = [found for page in pages if page is not None for _, found in page]
        return lines_of(lines, 0.0)  # PaddleOCR has dropped what it is unsure of

    def _difference(self, version: str) -> str:
        reasons = []
        if not version.startswith(PADDLE_VERSION):
            reasons.append(f"PaddleOCR {version} reads in place of 2.10.")
        for part, official in PADDLE_MODELS.items():
            if self.folders[part].name.removesuffix("_infer") != official.removesuffix("_infer"):
                reasons.append(f"The model {self.folders[part].name} stands in place of {official}.")
        return " ".join(reasons)


class OCRAsVLM:
    """Role vlm, for its reading questions alone: an OCR reader's lines in place of a vision-language model's answer.

    reader: any judge of role ocr; RapidOCR where none is given.

    The answer is as long as the text, whatever `max_new_tokens` allows. UserError for other questions.
    """

    def __init__(self, reader: Judge | None = None) -> None:
        self.reader = reader or RapidOCRReader()

    def record(self) -> JudgeRecord:
        known = self.reader.record()
        return replace(
            known,
            judge=type(self).__name__,
            differs="An OCR reader answers in place of the vision-language model Qwen2.5-VL-7B-Instruct.",
            settings={"reader": known.judge, **known.settings},
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        for _, question in asked:
            if not question["prompt"].startswith(READING_QUESTION):
                raise UserError(
                    f"OCRAsVLM can read, but not answer {question['prompt']!r}: name a vision-language model as "
                    "judges.vlm."
                )
        read = self.reader.judge([Asked(pictures, {}) for pictures, _ in asked])
        return [{"answer": "\n".join(line["text"] for line in found["lines"]) or NO_TEXT} for found in read]


def lines_of(lines: Sequence[tuple[str, float]], min_confidence: float) -> list[dict[str, Any]]:
    """The judgement's lines, of those that are sure enough."""
    return [{"text": text, "confidence": float(sure)} for text, sure in lines if sure >= min_confidence]


def paddle_version() -> str:
    """UserError where PaddleOCR is not installed, or one whose interface is another."""
    try:
        import paddleocr
    except ImportError as error:
        raise UserError(
            f"the judge PaddleReader needs PaddleOCR ({error}): install it with pip install 'zimage-lit[paddle]'."
        ) from None
    found = library_versions("paddleocr").get("paddleocr") or str(paddleocr.__version__)
    if not found.startswith("2."):
        raise UserError(
            f"the judge PaddleReader needs PaddleOCR 2.10, and {found} is installed, which takes other settings: "
            "pip install 'zimage-lit[paddle]'."
        )
    return found
