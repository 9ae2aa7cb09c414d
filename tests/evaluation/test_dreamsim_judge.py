"""DreamSim on small networks in its own files' form, against its arithmetic written out."""

import json
import math
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

from evaluation.judges.contract import Asked
from evaluation.judges.dreamsim import DreamSimJudge
from zimage_lit.errors import UserError

WIDTH, LAYERS, PATCH, FEATURES, RANK, ALPHA = 128, 2, 112, 20, 4, 0.5
ROLES = ("dino", "clip", "open_clip")
FILES = ("checkpoints/dino_vitbase16_pretrain.pth", "clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar")


def vit(generator: torch.Generator, norm_after_positions: bool) -> dict[str, Tensor]:
    """Random weights by DINO's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, (224 // PATCH) ** 2 + 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
    }
    norms = ["norm", *(["pos_drop"] if norm_after_positions else [])]
    for block in range(LAYERS):
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (rows, columns) in linears.items():
            shapes[f"blocks.{block}.{name}.weight"] = (rows * WIDTH, columns * WIDTH)
            shapes[f"blocks.{block}.{name}.bias"] = (rows * WIDTH,)
        norms += [f"blocks.{block}.norm1", f"blocks.{block}.norm2"]
    shapes |= {f"{norm}.{kind}": (WIDTH,) for norm in norms for kind in ("weight", "bias")}
    wide = ("patch_embed.proj.weight",)
    return {
        name: torch.randn(shape, generator=generator) * (0.01 if name in wide else 0.1)
        + (1 if ("norm" in name and name.endswith("weight")) or name == "pos_drop.weight" else 0)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dreamsim")
    generator = torch.Generator().manual_seed(0)
    (folder / "checkpoints").mkdir()
    torch.save(vit(generator, False), folder / FILES[0])
    for file in FILES[1:]:
        projection = torch.randn(WIDTH, FEATURES, generator=generator) * 0.1
        torch.save({"state_dict": vit(generator, True) | {"proj": projection}}, folder / file)
    additions = {}
    for place in range(3):
        for block in range(LAYERS):
            name = f"base_model.model.extractor_list.{place}.model.blocks.{block}.attn.qkv"
            additions[f"{name}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator) * 0.3
            additions[f"{name}.lora_B.weight"] = torch.randn(3 * WIDTH, RANK, generator=generator) * 0.3
    (folder / "ensemble_lora").mkdir()
    save_file(additions, folder / "ensemble_lora" / "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["qkv"], "use_rslora": False}
    (folder / "ensemble_lora" / "adapter_config.json").write_text(json.dumps(config))
    return folder


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def class_token(
    weights: dict[str, Tensor], low_rank: dict[str, Tensor], pixels: Tensor, eps: float, act: Callable
) -> Tensor:
    """Of the last block, (WIDTH,)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

    def layer(x: Tensor, name: str) -> Tensor:
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    patches = conv2d(pixels, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], PATCH)
    x = torch.cat([weights["cls_token"][0], patches[0].flatten(1).T]) + weights["pos_embed"][0]
    x = norm(x, "pos_drop") if "pos_drop.weight" in weights else x
    for block in range(LAYERS):
        name = f"blocks.{block}"
        normed = norm(x, f"{name}.norm1")
        extra = normed @ low_rank[f"{name}.attn.qkv.lora_A.weight"].T @ low_rank[f"{name}.attn.qkv.lora_B.weight"].T
        qkv = layer(normed, f"{name}.attn.qkv") + ALPHA / RANK * extra
        q, k, v = (part.unflatten(1, (-1, 64)).transpose(0, 1) for part in qkv.chunk(3, dim=1))
        seen = (q @ k.transpose(1, 2) / math.sqrt(64)).softmax(-1) @ v
        x = x + layer(seen.transpose(0, 1).flatten(1), f"{name}.attn.proj")
        x = x + layer(act(layer(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    return x[0]


def features(folder: Path, image: Image.Image) -> Tensor:
    levels = np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    shown = torch.from_numpy(levels).permute(2, 0, 1)[None]
    seen_by = {"dino": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))}
    clips = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    additions = load_file(folder / "ensemble_lora" / "adapter_model.safetensors")
    parts = []
    for place, (role, file) in enumerate(zip(ROLES, FILES, strict=True)):
        mean, deviation = (torch.tensor(values)[:, None, None] for values in seen_by.get(role, clips))
        weights = torch.load(folder / file)
        weights = weights.get("state_dict", weights)
        start = f"base_model.model.extractor_list.{place}.model."
        own = {name.removeprefix(start): tensor for name, tensor in additions.items() if name.startswith(start)}
        act = (lambda x: x * torch.sigmoid(1.702 * x)) if role == "clip" else gelu
        first = class_token(weights, own, (shown - mean) / deviation, 1e-6 if role == "dino" else 1e-5, act)
        if role != "dino":
            first = layer_norm(first, (WIDTH,), weights["norm.weight"], weights["norm.bias"], 1e-5) @ weights["proj"]
        parts.append(first)
    whole = torch.cat(parts)
    return whole - whole.mean()


def test_distances_are_those_of_the_arithmetic_written_out(folder: Path) -> None:
    images = [picture(seed) for seed in range(3)]
    pairs = list(combinations(images, 2))
    found = DreamSimJudge(str(folder), "cpu").judge([Asked(pair, {}) for pair in pairs])
    for (first, second), judgement in zip(pairs, found, strict=True):
        expected = 1 - torch.cosine_similarity(features(folder, first), features(folder, second), dim=0)
        assert judgement == {"distance": pytest.approx(float(expected), abs=1e-5)}
    assert min(judgement["distance"] for judgement in found) > 1e-3


def test_a_picture_is_at_no_distance_from_itself_and_pairs_have_no_order(folder: Path) -> None:
    judge = DreamSimJudge(str(folder), "cpu")
    one, other = picture(1), picture(2)
    same, there, back = judge.judge([Asked((one, one.copy()), {}), Asked((one, other), {}), Asked((other, one), {})])
    assert same == {"distance": 0.0}
    assert there == back and there["distance"] > 1e-3
    assert DreamSimJudge(str(folder), "cpu").judge([Asked((other, one), {})]) == [there]


def test_pictures_of_one_look_but_other_sizes_are_told_apart(folder: Path) -> None:
    """Their bytes may be the same."""
    wide = Image.frombytes("RGB", (60, 40), picture(3).tobytes())
    high = Image.frombytes("RGB", (40, 60), wide.tobytes())
    assert DreamSimJudge(str(folder), "cpu").judge([Asked((wide, high), {})])[0]["distance"] > 1e-3


def test_additions_in_a_pickle_and_dino_beside_the_others(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / FILES[0]).rename(tmp_path / "dino_vitbase16_pretrain.pth")
    (tmp_path / "ensemble_lora" / "adapter_model.safetensors").unlink()
    additions = load_file(folder / "ensemble_lora" / "adapter_model.safetensors")
    torch.save(additions, tmp_path / "ensemble_lora" / "adapter_model.bin")
    asked = [Asked((picture(1), picture(2)), {})]
    assert DreamSimJudge(str(tmp_path), "cpu").judge(asked) == DreamSimJudge(str(folder), "cpu").judge(asked)


def test_the_record_tells_small_networks_from_the_ensemble(folder: Path) -> None:
    record = DreamSimJudge(str(folder)).record()
    assert record.differs.startswith("its dino has {'width': 128, 'layers': 2, 'patch': 112}")
    assert record == DreamSimJudge(str(folder)).record() and len(record.revision) == 16


def test_what_is_missing_or_something_else_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dino_vitbase16_pretrain\.pth is missing: get it from https"):
        DreamSimJudge(str(tmp_path)).record()
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "ensemble_lora" / "adapter_config.json"
    asked = [Asked((picture(1), picture(2)), {})]
    config.write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "use_rslora": True}))
    with pytest.raises(UserError, match="asks for use_rslora"):
        DreamSimJudge(str(tmp_path), "cpu").judge(asked)
    shutil.copy(folder / "ensemble_lora" / "adapter_config.json", config)
    shutil.copy(folder / FILES[0], tmp_path / FILES[1])
    with pytest.raises(UserError, match=r"clip_vitb16_pretrain\.pth\.tar is not DreamSim's clip"):
        DreamSimJudge(str(tmp_path), "cpu").judge(asked)
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / FILES[1])
    with pytest.raises(UserError, match=r"clip_vitb16_pretrain\.pth\.tar holds no vision transformer"):
        DreamSimJudge(str(tmp_path), "cpu").judge(asked)
