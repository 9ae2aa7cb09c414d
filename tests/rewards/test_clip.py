"""CLIP-type rewards on tiny networks of the real classes, against transformers used directly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import SMALL, letters_tokenizer, save_clip
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from zimage_lit.errors import UserError
from zimage_lit.rewards import RewardSet
from zimage_lit.rewards.clip import AestheticReward, CLIPReward, HPSReward, PickScoreReward, linear_layers

PROMPTS = ["a red cat", "dog", "a very long prompt that goes on and on"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("siglip")
    text = {**SMALL, "vocab_size": 29, "max_position_embeddings": 12, "projection_size": 16}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**SMALL, "image_size": 32, "patch_size": 8}))
    model.save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    coarse = [
        torch.rand(3, 6, 8, generator=generator),
        torch.rand(3, 8, 6, generator=generator),
        torch.rand(3, 5, 5, generator=generator),
    ]
    sizes = [(48, 64), (64, 48), (40, 40)]
    return [
        (nn.functional.interpolate(image[None], size, mode="bicubic")[0].clamp(0, 1) * 255).to(torch.uint8)
        for image, size in zip(coarse, sizes, strict=True)
    ]


def directly(folder: Path, images: list[Tensor], prompts: list[str]) -> Any:
    """What transformers itself answers to pictures and texts together."""
    model = CLIPModel.from_pretrained(folder)
    words = PreTrainedTokenizerFast.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    pixels = CLIPImageProcessor.from_pretrained(folder)(images=arrays, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixel_values=pixels, **words), model


def test_the_scores_are_those_of_transformers(clip_folder: Path) -> None:
    folder, images = str(clip_folder), pictures()
    answer, model = directly(clip_folder, images, PROMPTS)
    rewards = RewardSet([CLIPReward(folder), PickScoreReward(folder, processor=folder), HPSReward(folder)])
    scores = rewards.score(images, PROMPTS)
    logits = answer.logits_per_image.diagonal()
    assert logits.std() > 0.1
    torch.testing.assert_close(scores["pick_score"], logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores["clip"], logits / model.logit_scale.exp().detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(scores["hps"], scores["clip"])


def test_a_score_does_not_depend_on_the_batch(clip_folder: Path) -> None:
    together = RewardSet([CLIPReward(str(clip_folder))]).score(pictures(), PROMPTS)["clip"]
    alone = RewardSet([CLIPReward(str(clip_folder), batch_size=1)]).score(pictures(), PROMPTS)["clip"]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_siglip_is_read_too(siglip_folder: Path) -> None:
    images = pictures()
    model = SiglipModel.from_pretrained(siglip_folder)
    words = PreTrainedTokenizerFast.from_pretrained(siglip_folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=12, return_tensors="pt"
    )
    words.pop("token_type_ids", None)
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    pixels = SiglipImageProcessor.from_pretrained(siglip_folder)(images=arrays, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        answer = model(pixel_values=pixels, **words)
    cosine = (answer.image_embeds * answer.text_embeds).sum(-1)
    scores = RewardSet([CLIPReward(str(siglip_folder))]).score(images, PROMPTS)["clip"]
    torch.testing.assert_close(scores, cosine, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_differentiable_form_prepares_pictures_as_the_processor_does(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = str(request.getfixturevalue(f"{kind}_folder"))
    reward = CLIPReward(folder, differentiable=True)
    reward.prepare("cpu")
    for image in pictures():
        here = reward._features.prepared(image.float() / 127.5 - 1)
        there = reward._features.processor(images=[image.permute(1, 2, 0).numpy()], return_tensors="pt")["pixel_values"]
        step = 1 / 255 / min(reward._features.processor.image_std)  # it rounds to 8 bits along each axis
        torch.testing.assert_close(here, there[0], rtol=0, atol=2 * step)


def test_the_gradient_is_that_of_finite_differences(clip_folder: Path) -> None:
    reward = CLIPReward(str(clip_folder), differentiable=True)
    reward.prepare("cpu")
    reward.model.double()
    generator = torch.Generator().manual_seed(5)
    image = (torch.rand(3, 40, 40, generator=generator, dtype=torch.float64) - 0.5).requires_grad_()
    way = torch.randn(3, 40, 40, generator=generator, dtype=torch.float64)

    def score(shift: float) -> Tensor:
        return reward.score([image + shift * way], PROMPTS[:1], [{}])[0]

    (gradient,) = torch.autograd.grad(score(0.0), image)
    slope = (score(1e-5) - score(-1e-5)) / 2e-5
    torch.testing.assert_close((gradient * way).sum(), slope.detach(), rtol=1e-6, atol=1e-9)
    assert slope.abs() > 1e-3


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_the_aesthetic_head_is_found_by_its_shapes(clip_folder: Path, tmp_path: Path, form: str) -> None:
    torch.manual_seed(4)
    # with the gaps of a Sequential whose dropouts have no weights, and a tenth layer that the alphabet puts first
    layers = {0: nn.Linear(12, 7), 2: nn.Linear(7, 5), 10: nn.Linear(5, 1)}
    weights = {
        f"layers.{place}.{name}": w.detach() for place, layer in layers.items() for name, w in layer.named_parameters()
    }
    path = tmp_path / f"head.{form}"
    save_file(weights, path) if form == "safetensors" else torch.save(weights, path)
    images = pictures()
    answer, _ = directly(clip_folder, images, PROMPTS)
    scores = RewardSet([AestheticReward(str(clip_folder), str(path))]).score(images, PROMPTS)["aesthetic"]
    expected = layers[10](layers[2](layers[0](answer.image_embeds)))[:, 0]
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"\(7, 12\).* do not lead from 13 numbers to one"):
        linear_layers("a", path, 13)


def test_what_is_not_there_is_named(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        CLIPReward(str(tmp_path / "nowhere")).prepare("cpu")
    with pytest.raises(UserError, match="cannot be loaded"):
        CLIPReward(str(tmp_path)).prepare("cpu")
    with pytest.raises(UserError, match="there is no head"):
        AestheticReward(str(clip_folder), str(tmp_path / "head.pth")).prepare("cpu")


def test_the_version_names_the_weights(clip_folder: Path, siglip_folder: Path) -> None:
    one, other = CLIPReward(str(clip_folder)), CLIPReward(str(siglip_folder), name="b")
    one.prepare("cpu")
    other.prepare("cpu")
    assert one.version != other.version and one._features.fingerprint in one.version
