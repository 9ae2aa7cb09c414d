"""Text in pictures, read by RapidOCR: a small detector of lines and a small reader of them, on the CPU."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from zimage_lit.errors import UserError

PARTS = ("Det", "Cls", "Rec")  # finds lines, tells whether they stand upside down, reads them
NAMED_FILES = ("model_path", "rec_keys_path")
CHOICES = {"engine_type": "EngineType", "model_type": "ModelType", "ocr_version": "OCRVersion"}  # RapidOCR's enums
THREADS = "EngineConfig.onnxruntime.intra_op_num_threads"


class TextReader:
    """RapidOCR with the models that come with it, or with others.

    who: reads, for messages: "the reward ocr".
    options: of RapidOCR, by the keys of its config.yaml, such as `Det.model_path` and `Rec.model_path`.

    UserError where RapidOCR is not installed (`pip install 'zimage-lit[ocr]'`), and for options that it does not know
    or cannot follow.
    """

    def __init__(self, who: str, options: Mapping[str, Any]) -> None:
        try:
            import rapidocr
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError(
                f"{who} reads with RapidOCR ({error}): install it with pip install 'zimage-lit[ocr]'."
            ) from None
        try:
            self._engine: Any = RapidOCR(params={**_ours(), **_checked(who, options, rapidocr)})
        except (ValueError, TypeError) as error:
            raise UserError(f"{who}: RapidOCR does not take the options {dict(options)} ({error}).") from error

    def read(self, picture: Image.Image) -> list[tuple[str, float]]:
        """The lines in an RGB picture with the reader's confidence in [0, 1], from top to bottom."""
        found = self._engine(picture)
        return [(text, float(score)) for text, score in zip(found.txts or (), found.scores or (), strict=True)]

    def name(self) -> str:
        """The models' names, such as `RapidOCR PP-OCRv6 small`."""
        reads = self._engine.cfg.Rec
        return f"RapidOCR {reads.ocr_version.value} {reads.model_type.value}"

    def models(self) -> dict[str, Path | str]:
        """For each of Det, Cls and Rec: the file that the options name, else the SHA-256 that RapidOCR has of its own
        file and checks it by."""
        from rapidocr.inference_engine.base import FileInfo, InferSession

        found: dict[str, Path | str] = {}
        for part in PARTS:
            settings = self._engine.cfg[part]
            if settings.model_path:
                found[part] = Path(settings.model_path)
                continue
            kind = ("engine_type", "ocr_version", "task_type", "lang_type", "model_type")
            found[part] = InferSession.get_model_url(FileInfo(**{key: settings[key] for key in kind}))["SHA256"]
        return found


def _ours() -> dict[str, Any]:
    """What the options may overrule: no messages; nothing left out as unsure, which is for the caller to say; torch's
    number of threads, for its own default is one a core, spinning, whatever else runs."""
    return {"Global.log_level": "error", "Global.text_score": 0.0, THREADS: torch.get_num_threads()}


def _checked(who: str, options: Mapping[str, Any], rapidocr: Any) -> dict[str, Any]:
    """The options in RapidOCR's own types; UserError for what it would take without a word and not use."""
    from omegaconf import OmegaConf

    known = OmegaConf.load(Path(rapidocr.__file__).with_name("config.yaml"))
    checked = {}
    for key, value in options.items():
        group, _, name = key.rpartition(".")
        if not group or name not in (OmegaConf.select(known, group) or {}):
            raise UserError(f"{who}: RapidOCR has no option {key}: see its config.yaml.")
        if name in NAMED_FILES and value is not None and not Path(value).is_file():
            raise UserError(f"{who}: there is no file {value}, which the option {key} names: check the path.")
        checked[key] = getattr(rapidocr, CHOICES[name])(value) if name in CHOICES else value
    return checked
