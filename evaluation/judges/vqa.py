"""Judges of short questions about pictures: mPLUG, which DPG-Bench asks, and what may stand in for it: BLIP, or any
vision-language model asked for yes or no.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError

from evaluation.judges.contract import Asked, Judge, JudgeRecord
from evaluation.judges.mplug import CHECKPOINT, MPlug, MPlugConfig
from evaluation.judges.weights import folder_revision, library_versions
from zimage_lit.errors import UserError
from zimage_lit.pipeline import usable_device

OFFICIAL = "damo/mplug_visual-question-answering_coco_large_en"
OFFICIAL_SIZES = (  # whose defaults in MPlugConfig are mPLUG-large's
    "vision_width",
    "clip_vision_layers",
    "clip_vision_patch_size",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "num_hidden_layers",
    "text_encoder_layers",
    "fusion_layers",
    "text_decode_layers",
    "vocab_size",
)
LONGEST_QUESTION = 25  # tokens, with the first and the last; the rest is cut off
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BLIP_ANSWER = {"num_beams": 5, "min_new_tokens": 1, "max_new_tokens": 10}
YES_OR_NO = "{question} Answer with yes or no only."
YES_OR_NO_TOKENS = 8


class MPLUGJudge:
    """Role vqa: mPLUG-large, as DPG-Bench asks it, from its folder as published.

    folder: config.yaml, config_bert.json, vocab.txt and pytorch_model.bin of
        damo/mplug_visual-question-answering_coco_large_en, from ModelScope.
    device: what it computes on, in float32; by default a GPU where there is one.

    `differs` is told by the sizes, for no checksum of the weights is published with the benchmark: other weights of
    these sizes pass for the official ones.
    """

    def __init__(self, folder: str, device: str | None = None) -> None:
        self.folder = folder
        self.device = device
        self._model: MPlug | None = None
        self._tokenizer: Any = None

    def record(self) -> JudgeRecord:
        """UserError for a folder that holds no mPLUG."""
        config, official = MPlugConfig.from_folder(self.folder), MPlugConfig()
        for name in (CHECKPOINT, "vocab.txt"):
            if not (Path(self.folder) / name).is_file():
                raise UserError(f"{self.folder} holds no {name}: download {OFFICIAL} there.")
        differs = [
            f"{name} is {getattr(config, name)}, not {getattr(official, name)} as in mPLUG-large."
            for name in OFFICIAL_SIZES
            if getattr(config, name) != getattr(official, name)
        ]
        return JudgeRecord(
            judge=type(self).__name__,
            model="mPLUG" if differs else OFFICIAL,
            revision=folder_revision(self.folder),
            differs=" ".join(differs),
            settings={"dtype": "float32", "longest_question": LONGEST_QUESTION},
            versions=library_versions("torch", "transformers", "pillow"),
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        if self._model is None:
            self._load()
        return [{"answer": self._answer(pictures[0], question["question"])} for pictures, question in asked]

    def _load(self) -> None:
        from transformers import BertTokenizer

        self.record()
        self._tokenizer = BertTokenizer.from_pretrained(self.folder, local_files_only=True)
        self._model = MPlug.from_pretrained(self.folder).to(usable_device(self.device))

    def _answer(self, picture: Image.Image, question: str) -> str:
        assert self._model is not None
        tokens = self._tokenizer(question.lower(), truncation=True, max_length=LONGEST_QUESTION)["input_ids"]
        device = self._model.text_decoder.bias.device
        seen = as_input(picture, self._model.config.image_res).to(device)
        found = self._model.answer(seen, torch.tensor(tokens, device=device))
        return str(self._tokenizer.decode(found, skip_special_tokens=True))


class BlipVQAJudge:
    """Role vqa: BLIP for visual questions (Li et al. 2022, arXiv 2201.12086), in mPLUG's place.

    folder: of the model with tokenizer and image processor, such as Salesforce/blip-vqa-capfilt-large.
    device: what it computes on, in float32; by default a GPU where there is one.

    Questions are put to it as DPG-Bench puts them to mPLUG: in small letters, of at most 25 tokens, answered by the
    best of 5 beams.
    """

    def __init__(self, folder: str, device: str | None = None) -> None:
        self.folder = folder
        self.device = device
        self._model: Any = None

    def record(self) -> JudgeRecord:
        """UserError for a folder that holds no BLIP for visual questions."""
        self._check()
        return JudgeRecord(
            judge=type(self).__name__,
            model="BLIP",
            revision=folder_revision(self.folder),
            differs="BLIP answers in place of mPLUG-large.",
            settings={"dtype": "float32", "longest_question": LONGEST_QUESTION, **BLIP_ANSWER},
            versions=library_versions("transformers", "torch", "pillow"),
        )

    @torch.inference_mode()
    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        if self._model is None:
            self._load()
        return [{"answer": self._answer(pictures[0], question["question"])} for pictures, question in asked]

    def _answer(self, picture: Image.Image, question: str) -> str:
        tokens = self._tokenizer(
            question.lower(), truncation=True, max_length=LONGEST_QUESTION, return_tensors="pt"
        ).to(self._model.device)
        pixels = self._processor(images=picture, return_tensors="pt")["pixel_values"].to(self._model.device)
        found = self._model.generate(
            pixel_values=pixels, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], **BLIP_ANSWER
        )
        return str(self._tokenizer.decode(found[0], skip_special_tokens=True))

    def _load(self) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, BlipForQuestionAnswering

        self._check()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            self._processor = AutoImageProcessor.from_pretrained(self.folder, local_files_only=True, backend="pil")
            model: torch.nn.Module = BlipForQuestionAnswering.from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"{self.folder} cannot be loaded as BLIP ({str(error).splitlines()[0]}): download "
                "Salesforce/blip-vqa-capfilt-large there."
            ) from error
        self._model = model.to(usable_device(self.device)).eval()

    def _check(self) -> None:
        from transformers import AutoConfig

        try:
            kind = AutoConfig.from_pretrained(self.folder, local_files_only=True).model_type
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder} holds no model for the judge vqa ({str(error).splitlines()[0]}): download "
                "Salesforce/blip-vqa-capfilt-large there."
            ) from error
        if kind != "blip":
            raise UserError(f"{self.folder} holds a {kind}, not a BLIP: download Salesforce/blip-vqa-capfilt-large.")


class VLMAsVQA:
    """Role vqa: a vision-language model asked for yes or no; the answer is the first word that it says.

    vlm: any judge of role vlm.
    """

    def __init__(self, vlm: Judge) -> None:
        self.vlm = vlm

    def record(self) -> JudgeRecord:
        known = self.vlm.record()
        return replace(
            known,
            judge=type(self).__name__,
            differs="A vision-language model answers in place of mPLUG-large.",
            settings={"vlm": known.judge, "question": YES_OR_NO, **known.settings},
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        prompts = [YES_OR_NO.format(question=question["question"]) for _, question in asked]
        questions = [
            Asked(pictures, {"prompt": prompt, "max_new_tokens": YES_OR_NO_TOKENS})
            for (pictures, _), prompt in zip(asked, prompts, strict=True)
        ]
        return [{"answer": first_word(found["answer"])} for found in self.vlm.judge(questions)]


def as_input(picture: Image.Image, size: int) -> torch.Tensor:
    """RGB -> (3, size, size), squeezed into a square and normalised as CLIP's pictures are."""
    from torchvision.transforms import functional

    resized = functional.to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))
    return functional.normalize(resized, list(CLIP_MEAN), list(CLIP_STD))


def first_word(answer: str) -> str:
    """In small letters, without marks; empty where there is none."""
    found = re.search(r"[^\W_]+", answer.lower())
    return found.group() if found else ""
