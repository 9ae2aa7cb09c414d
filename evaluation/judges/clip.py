"""CLIP as a judge: how alike a picture and a text are (CVTG-2K's CLIPScore).

The network is transformers' CLIPModel; what it is shown is what OpenAI's own package (openai/CLIP, clip.py and
simple_tokenizer.py), with which the benchmarks were made, shows it.
"""

import html
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.judges.weights import file_sha256, folder_revision, library_versions
from zimage_lit.errors import UserError
from zimage_lit.pipeline import usable_device
from zimage_lit.rewards.clip import CLIPFeatures

MODEL = "openai/clip-vit-large-patch14"
WEIGHTS = {  # the published files, in the order in which transformers looks for them -> SHA-256
    "model.safetensors": "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    "pytorch_model.bin": "f1a17cdbe0f36fec524f5cafb1c261ea3bbbc13e346e0f74fc9eb0460dedd0d3",
}
STRAIGHT_QUOTES = str.maketrans(dict.fromkeys("‘’‚‛ʼ", "'") | dict.fromkeys("“”„‟", '"'))


class CLIPJudge:
    """Role `clip`: the cosine of a picture's and a text's features, a text of more than 77 tokens cut at its end.

    folder: of openai/clip-vit-large-patch14, the benchmark's own, or of another CLIP in transformers' form, whose
        judgements are not comparable.
    device: what it computes on; by default a GPU where there is one.

    Computes in float32, one picture and one text at a time; the benchmark's script in half precision on a GPU.
    """

    def __init__(self, folder: str, device: str | None = None) -> None:
        self.folder = folder
        self.device = device

    def record(self) -> JudgeRecord:
        """UserError for a folder that is absent or empty."""
        differs = clip_differs(self.folder)
        return JudgeRecord(
            judge=type(self).__name__,
            model="CLIP" if differs else MODEL,
            revision=folder_revision(self.folder),
            differs=differs,
            settings={"precision": "float32"},
            versions=library_versions("torch", "torchvision", "transformers", "pillow"),
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """Questions {"text"} -> {"similarity"}. UserError, at the first call, for a folder that holds no CLIP."""
        return [{"similarity": self._similarity(one.pictures[0], one.question["text"])} for one in asked]

    @cached_property
    def _clip(self) -> "OpenAICLIP":
        return OpenAICLIP("the judge clip", self.folder, self.device)

    def _similarity(self, picture: Image.Image, text: str) -> float:
        return float(self._clip.of_picture(picture) @ self._clip.of_texts([text])[0])


class OpenAICLIP:
    """A CLIP that is shown pictures and texts as by OpenAI's package. UserError for a folder that holds none.

    owner: whose sentence an error is, such as "the judge clip".
    """

    def __init__(self, owner: str, folder: str, device: str | None) -> None:
        self._features = CLIPFeatures(owner, folder, folder)
        config = self._features.model.config
        if config.model_type != "clip":
            raise UserError(f"{owner}: {folder} holds a network of the type {config.model_type}; give a CLIP's folder.")
        self._features.model.to(usable_device(device)).requires_grad_(False)
        size = config.vision_config.image_size
        processor = self._features.processor
        self._prepare = transforms.Compose(  # of PIL pictures: transformers' own resizes and crops a little otherwise
            [
                transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize(processor.image_mean, processor.image_std),
            ]
        )

    @torch.inference_mode()
    def of_picture(self, picture: Image.Image) -> Tensor:
        """RGB -> normalised features (D,)."""
        return self._features.of_pixels(self._prepare(picture)[None])[0]

    @torch.inference_mode()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Normalised features (N, D)."""
        return self._features.of_texts([as_openai_reads(text) for text in texts])


def as_openai_reads(text: str) -> str:
    """What OpenAI's package makes of a text before its tokens: straight quotes and no HTML entities.

    It mends broken encodings too, which no text of the benchmarks has; small letters and single blanks are the
    tokenizer's work.
    """
    return html.unescape(html.unescape(text.translate(STRAIGHT_QUOTES))).strip()


def clip_differs(folder: str | Path) -> str:
    """Why a folder's weights are not OpenAI's CLIP ViT-L/14 as they are published, empty if they are.

    By the SHA-256 of the file that transformers reads: the same numbers in another file are not recognised.
    """
    used = next((name for name in WEIGHTS if (Path(folder) / name).is_file()), None)
    if used is not None and file_sha256(Path(folder) / used) == WEIGHTS[used]:
        return ""
    return f"its CLIP is not {MODEL}, whose {' or '.join(WEIGHTS)} was not found unchanged"
