"""Judges of short questions: mPLUG and BLIP in small, and a vision-language model in their place."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_mplug import BERT, SETTINGS, write_folder
from transformers import (
    AutoImageProcessor,
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
)

from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.judges.mplug import MPlug
from evaluation.judges.vqa import OFFICIAL, BlipVQAJudge, MPLUGJudge, VLMAsVQA, as_input, first_word
from evaluation.judging import build_judges
from zimage_lit.errors import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "red", "?", "yes", "no", "[DEC]"]


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_mplug_is_asked_in_small_letters_about_a_square_picture(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, end_bias=8)
    judge = MPLUGJudge(str(folder), device="cpu")
    asked = [Asked((picture(0),), {"question": "Is it RED?"}), Asked((picture(1),), {"question": "w5 " * 40})]
    answers = judge.judge(asked)
    words = (folder / "vocab.txt").read_text().split("\n")
    red = [words.index(word) for word in ("[CLS]", "is", "it", "red", "?", "[SEP]")]
    cut = [words.index("[CLS]"), *[words.index("w5")] * 23, words.index("[SEP]")]
    model = MPlug.from_pretrained(folder)
    for answer, seen, question in zip(answers, (picture(0), picture(1)), (red, cut), strict=True):
        tokens = model.answer(as_input(seen, 42), torch.tensor(question))
        assert answer == {"answer": " ".join(words[token] for token in tokens if not words[token].startswith("["))}
    assert judge.judge(asked[::-1]) == answers[::-1]


def test_pictures_become_what_clip_sees() -> None:
    seen = as_input(Image.new("RGB", (60, 40), (255, 0, 51)), 42)
    expected = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, (0.2 - 0.40821073) / 0.27577711]
    assert seen.shape == (3, 42, 42) and torch.allclose(seen[:, 7, 9], torch.tensor(expected))
    half = Image.new("RGB", (4, 2), "black")
    half.paste((255, 255, 255), (2, 0, 4, 2))
    left, right = as_input(half, 42)[:, 0, [0, -1]].T
    assert torch.allclose(right - left, 1 / torch.tensor([0.26862954, 0.26130258, 0.27577711]))


def test_mplug_is_official_by_its_sizes(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    record = MPLUGJudge(str(folder)).record()
    assert "hidden_size is 32, not 768 as in mPLUG-large." in record.differs and record.model == "mPLUG"
    large = {**BERT, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12}
    large |= {"text_encoder_layers": 6, "fusion_layers": 6, "text_decode_layers": 12, "vocab_size": 30522}
    (folder / "config_bert.json").write_text(json.dumps(large))
    (folder / "config.yaml").write_text(yaml.safe_dump({**SETTINGS, "vision_width": 1024, "clip_vision_layers": 24}))
    record = MPLUGJudge(str(folder)).record()
    assert (record.differs, record.model) == ("", OFFICIAL)
    (folder / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"holds no vocab.txt: download damo/mplug"):
        MPLUGJudge(str(folder)).record()


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS[:-1]))  # the token of the answer's start is not among them
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 32, "bos_token_id": 11, "sep_token_id": 3}
    torch.manual_seed(0)
    config = BlipConfig(text_config={**sizes, **text, "pad_token_id": 0}, vision_config={**sizes, "image_size": 32})
    BlipForQuestionAnswering(config).save_pretrained(folder)
    BlipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@torch.inference_mode()
def answered_by_blip(folder: Path, seen: Image.Image, tokens: list[int]) -> str:
    model = BlipForQuestionAnswering.from_pretrained(folder)
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=seen, return_tensors="pt")["pixel_values"]
    found = model.generate(
        pixel_values=pixels, input_ids=torch.tensor([tokens]), num_beams=5, min_new_tokens=1, max_new_tokens=10
    )
    return " ".join(WORDS[token] for token in found[0] if not WORDS[token].startswith("["))


def test_blip_is_asked_as_mplug_is(blip: Path) -> None:
    judge = BlipVQAJudge(str(blip), device="cpu")
    asked = [Asked((picture(0),), {"question": "Is it RED?"}), Asked((picture(1),), {"question": "red " * 40})]
    answers = judge.judge(asked)
    assert answers == [
        {"answer": answered_by_blip(blip, picture(0), [2, 5, 6, 7, 8, 3])},
        {"answer": answered_by_blip(blip, picture(1), [2, *[7] * 23, 3])},
    ]
    assert judge.judge(asked[1:]) == answers[1:]
    assert judge.record().differs == "BLIP answers in place of mPLUG-large."


def test_folders_without_blip_are_refused(tmp_path: Path, blip: Path) -> None:
    with pytest.raises(UserError, match="holds no model for the judge vqa"):
        BlipVQAJudge(str(tmp_path / "none")).record()
    shutil.copytree(blip, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    for cut in (None, 100):
        if cut:
            (tmp_path / "half/model.safetensors").write_bytes((blip / "model.safetensors").read_bytes()[:-cut])
        with pytest.raises(UserError, match="half cannot be loaded as BLIP"):
            BlipVQAJudge(str(tmp_path / "half")).judge([Asked((picture(0),), {"question": "red?"})])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="holds a bert, not a BLIP"):
        BlipVQAJudge(str(tmp_path)).record()


class Played:
    """A judge of role vlm that answers in turn."""

    def __init__(self, *answers: str) -> None:
        self.answers = answers
        self.asked: list[Any] = []

    def record(self) -> JudgeRecord:
        return JudgeRecord("Played", "talker", "1", "it plays", {"a": 1}, {"library": "2"})

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        self.asked += [question for _, question in asked]
        return [{"answer": answer} for answer in self.answers]


def test_a_language_model_answers_by_its_first_word() -> None:
    vlm = Played("Yes, it is.", "\n**No**", "")
    judge = VLMAsVQA(vlm)
    asked = [Asked((picture(i),), {"question": f"Is it {i}?"}) for i in range(3)]
    assert judge.judge(asked) == [{"answer": "yes"}, {"answer": "no"}, {"answer": ""}]
    assert vlm.asked[1] == {"prompt": "Is it 1? Answer with yes or no only.", "max_new_tokens": 8}
    record = judge.record()
    assert record.differs == "A vision-language model answers in place of mPLUG-large."
    assert record.settings["vlm"] == "Played" and record.settings["a"] == 1
    assert first_word("_yes_") == "yes"


def test_judges_of_judges_can_be_named_in_settings() -> None:
    endpoint = {"class_path": "evaluation.judges.vlm.EndpointJudge", "init_args": {"url": "http://x/v1", "model": "m"}}
    reader = {"class_path": "evaluation.judges.ocr.RapidOCRReader", "init_args": {"options": {"Rec.lang_type": "en"}}}
    components = {
        "vqa": {"class_path": "evaluation.judges.vqa.VLMAsVQA", "init_args": {"vlm": endpoint}},
        "vlm": {"class_path": "evaluation.judges.ocr.OCRAsVLM", "init_args": {"reader": reader}},
    }
    judges: Any = build_judges(components, ["vqa", "vlm"])
    assert judges["vqa"].vlm.model == "m" and judges["vlm"].reader.options == {"Rec.lang_type": "en"}
