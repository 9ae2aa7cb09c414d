"""OneIG's style: CSD's converted tower against OpenAI's own arithmetic, and the judge on small networks."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_files import official
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from evaluation.judges.contract import Asked
from evaluation.judges.style import (
    FILES,
    REFERENCES,
    CSDEncoder,
    StyleJudge,
    openai_tower,
    read_references,
    references_digest,
)
from zimage_lit.errors import UserError

WIDTH, LAYERS, PATCH, SIDE, FEATURES = 128, 2, 8, 32, 12
STYLES = ("baroque", "lego")


class Block(nn.Module):
    """A block of OpenAI's towers, as clip/model.py names and computes it."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64)
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        wide = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](wide * torch.sigmoid(1.702 * wide))


class Tower(nn.Module):
    """OpenAI's picture tower up to its projection: tokens first, then the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(Block() for _ in range(LAYERS))})
        self.ln_post = nn.LayerNorm(WIDTH)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).permute(2, 0, 1)
        first = self.class_embedding.expand(1, len(pixels), -1)
        x = self.ln_pre(torch.cat([first, patches]) + self.positional_embedding[:, None])
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x[0])


@pytest.fixture(scope="module")
def tower() -> Tower:
    torch.manual_seed(0)
    tower = Tower()
    for name, parameter in tower.named_parameters():
        if "ln_" in name or parameter.ndim == 1:
            nn.init.normal_(parameter, 1 if name.endswith("weight") else 0, 0.3)
        else:
            nn.init.normal_(parameter, std=0.15)
    return tower.eval()


@pytest.fixture(scope="module")
def folder(tower: Tower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint.pth, encoder/ and references/ of a small judge."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("style")
    state = {f"module.backbone.{name}": tensor for name, tensor in tower.state_dict().items()}
    for head in ("style", "content"):
        state[f"module.last_layer_{head}"] = torch.randn(WIDTH, FEATURES)
    checkpoint = {"model_state_dict": state, "iter": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(checkpoint, folder / "checkpoint.pth")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=SIDE, patch_size=PATCH, projection_dim=10, hidden_act="gelu")
    encoder = CLIPVisionModelWithProjection(config)
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    encoder.save_pretrained(folder / "encoder")
    (folder / "references").mkdir()
    for name, width, dtype in (("CSD", FEATURES, torch.float32), ("SE", 10, torch.bfloat16)):
        features = {style: normalize(torch.randn(3, width), dim=-1).to(dtype) for style in STYLES}
        torch.save(features, folder / "references" / f"{name}_embed.pt")
    return folder


def judge(folder: Path) -> StyleJudge:
    return StyleJudge(str(folder / "checkpoint.pth"), str(folder / "encoder"), str(folder / "references"), "cpu")


def picture(seed: int, width: int = 50, height: int = 40) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: Image.Image) -> Tensor:
    """(1, 3, SIDE, SIDE), by hand: the shorter side to SIDE, the middle of the other, CLIP's mean and deviation."""
    scale = SIDE / min(image.size)
    resized = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - SIDE) / 2), round((resized.height - SIDE) / 2)
    levels = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), dtype=np.float32) / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    return torch.from_numpy((levels - mean) / std).float().permute(2, 0, 1)[None]


@torch.no_grad()
def test_the_converted_tower_computes_what_openais_does(tower: Tower) -> None:
    shown = torch.cat([pixels(picture(seed)) for seed in range(3)])
    expected = tower(shown)
    found = openai_tower(tower.state_dict(), "the tower")(pixel_values=shown).pooler_output
    assert expected.std(dim=0).min() > 0.01  # the pictures look different to it
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_csd_projects_for_style(tower: Tower, folder: Path) -> None:
    projection = torch.load(folder / "checkpoint.pth", weights_only=False)["model_state_dict"][
        "module.last_layer_style"
    ]
    expected = normalize(tower(pixels(picture(4))) @ projection, dim=-1)[0]
    found = CSDEncoder(str(folder / "checkpoint.pth"), torch.device("cpu"))(picture(4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_judgements_are_cosines_to_the_styles_references(tower: Tower, folder: Path) -> None:
    asked = [Asked((picture(seed),), {"style": style}) for seed in (1, 2) for style in STYLES]
    found = judge(folder).judge(asked)
    csd = CSDEncoder(str(folder / "checkpoint.pth"), torch.device("cpu"))
    encoder = CLIPVisionModelWithProjection.from_pretrained(folder / "encoder").bfloat16().eval()
    for one, judgement in zip(asked, found, strict=True):
        assert judgement.keys() == {"csd", "se"}
        references = {name: torch.load(folder / "references" / f"{name}_embed.pt") for name in ("CSD", "SE")}
        ours = references["CSD"][one.question["style"]] @ csd(one.pictures[0])
        assert judgement["csd"] == pytest.approx(ours.tolist(), abs=1e-6)
        seen = encoder(pixels(one.pictures[0]).bfloat16()).image_embeds.float()
        theirs = references["SE"][one.question["style"]].float() @ normalize(seen, dim=-1)[0]
        assert judgement["se"] == pytest.approx(theirs.tolist(), abs=0.02)  # bfloat16
        assert max(map(abs, judgement["se"])) > 0.05
    assert found[0] != found[2]


def test_judgements_do_not_depend_on_what_else_is_asked(folder: Path) -> None:
    asked = [Asked((picture(seed),), {"style": "lego"}) for seed in range(3)]
    together = judge(folder).judge(asked)
    assert together == judge(folder).judge(asked[::-1])[::-1]
    assert together[1:2] == judge(folder).judge(asked[1:2])


def test_the_record_tells_other_weights_apart(folder: Path, tmp_path: Path) -> None:
    record = judge(folder).record()
    assert "its CSD has" in record.differs and "'width': 128" in record.differs
    assert record == judge(folder).record()
    other = {style: features + 1 for style, features in torch.load(folder / "references" / "CSD_embed.pt").items()}
    for name in ("CSD", "SE"):
        torch.save(other, tmp_path / f"{name}_embed.pt")
    moved = StyleJudge(str(folder / "checkpoint.pth"), str(folder / "encoder"), str(tmp_path)).record()
    assert moved.identity != record.identity and moved.revision == record.revision


def test_references_are_the_same_pickled_and_plain(folder: Path, tmp_path: Path) -> None:
    pickled = read_references(folder / "references" / "SE_embed")
    names = sorted(pickled, reverse=True)
    np.save(tmp_path / "SE_embed.npy", torch.stack([pickled[name] for name in names]).float().numpy())
    (tmp_path / "SE_embed_keys.json").write_text(json.dumps(names))
    plain = read_references(tmp_path / "SE_embed")
    assert references_digest(plain) == references_digest(pickled)
    assert all(torch.equal(plain[name], pickled[name].float()) for name in names)


def test_the_benchmarks_references_are_known() -> None:
    folder = official("oneig") / "scripts" / "style"
    for name, file in FILES.items():
        references = read_references(folder / file)
        assert references_digest(references) == REFERENCES[name]
        assert len(references) == 29 and {len(features) for features in references.values()} == {3}
        lengths = torch.cat([features.float().norm(dim=-1) for features in references.values()])
        assert (lengths - 1).abs().max() < 4e-3  # normalised, those of `se` in bfloat16


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reference features of the style cubism"):
        judge(folder).judge([Asked((picture(0),), {"style": "cubism"})])
    with pytest.raises(UserError, match=r"CSD_embed\.pt"):
        StyleJudge(str(folder / "checkpoint.pth"), str(folder / "encoder"), str(tmp_path)).record()
    torch.save({"model_state_dict": {"weight": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth is no checkpoint of CSD"):
        StyleJudge(str(tmp_path / "other.pth"), str(folder / "encoder"), str(folder / "references")).record()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        StyleJudge(str(folder / "checkpoint.pth"), str(folder / "references"), str(folder / "references")).record()
