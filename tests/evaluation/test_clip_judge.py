"""CLIP as a judge, on a tiny network of the real class, against transformers used directly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import save_clip
from transformers import CLIPModel, PreTrainedTokenizerFast

from evaluation.judges import clip
from evaluation.judges.clip import CLIPJudge, as_openai_reads
from evaluation.judges.contract import Asked
from zimage_lit.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


def picture(seed: int, size: tuple[int, int] = (40, 33)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def asked(image: Image.Image, text: str) -> Asked:
    return Asked((image,), {"text": text})


def directly(folder: Path, image: Image.Image, text: str) -> float:
    """The cosine, with the picture resized and cropped as torchvision, which OpenAI's package uses, says it."""
    scale = 32 / min(image.size)
    size = tuple(32 if side == min(image.size) else int(side * scale) for side in image.size)
    left, top = (round((side - 32) / 2) for side in size)
    crop = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    pixels = (torch.from_numpy(np.asarray(crop) / 255) - torch.tensor(mean)) / torch.tensor(std)
    model, tokenizer = CLIPModel.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    words = tokenizer(text, truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=pixels.permute(2, 0, 1)[None].float(), **words)
    return torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds).item()


@pytest.mark.parametrize("size", [(40, 33), (33, 61), (32, 32), (20, 47)])
def test_the_similarity_is_the_cosine(folder: Path, size: tuple[int, int]) -> None:
    image = picture(1, size)
    (judgement,) = CLIPJudge(str(folder), device="cpu").judge([asked(image, "arch")])
    assert judgement == {"similarity": pytest.approx(directly(folder, image, "arch"), abs=1e-5)}


def test_a_judgement_does_not_depend_on_what_else_is_asked(folder: Path) -> None:
    questions = [asked(picture(1), "a"), asked(picture(2), "a much longer text"), asked(picture(1), "b")]
    judge = CLIPJudge(str(folder), "cpu")
    together = judge.judge(questions)
    assert len({one["similarity"] for one in together}) == 3
    assert together == [judge.judge([one])[0] for one in questions]


def test_a_long_text_is_cut_at_its_end(folder: Path) -> None:
    judge = CLIPJudge(str(folder), "cpu")
    texts = ["abcdefghij", "abcdefghijklmnop", "abcdefghi"]  # ten letters fit between the start and the end
    cut, long, short = (judge.judge([asked(picture(1), text)]) for text in texts)
    assert cut == long != short


def test_texts_are_read_as_openais_package_reads_them(folder: Path) -> None:
    assert as_openai_reads(" It’s a “café” – 5 &lt; 6 &amp;amp; 7 ") == 'It\'s a "café" – 5 < 6 & 7'
    judge = CLIPJudge(str(folder), "cpu")
    assert judge.judge([asked(picture(1), "b&amp;b")]) == judge.judge([asked(picture(1), "b&b")])


def test_only_the_published_weights_are_comparable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = CLIPJudge(str(folder)).record()
    assert "openai/clip-vit-large-patch14" in record.differs and record.model == "CLIP"
    published = clip.WEIGHTS["model.safetensors"]
    monkeypatch.setattr(clip, "file_sha256", lambda file: published if file.name == "model.safetensors" else "")
    record = CLIPJudge(str(folder)).record()
    assert (record.differs, record.model) == ("", "openai/clip-vit-large-patch14")
    assert set(record.versions) == {"torch", "torchvision", "transformers", "pillow"}


def test_what_is_no_clip_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere"):
        CLIPJudge(str(tmp_path / "nowhere")).record()
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match=r"the judge clip: .* cannot be loaded"):
        CLIPJudge(str(tmp_path)).judge([asked(picture(1), "a")])
