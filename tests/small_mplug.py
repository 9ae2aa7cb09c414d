"""An mPLUG of 32 channels in a folder as published, its weights made of their names."""

import json
import zlib
from pathlib import Path

import torch
import yaml

from evaluation.judges.mplug import CHECKPOINT, END

WORDS = 130
BERT = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "num_hidden_layers": 5,
    "type_vocab_size": 2,
    "vocab_size": WORDS,
    "encoder_width": 32,
    "text_encoder_layers": 2,
    "fusion_layers": 4,
    "text_decode_layers": 2,
    "stride_layer": 2,
}
SETTINGS = {
    "bert_config": "configs/config_bert.json",
    "image_res": 42,
    "vision_width": 64,
    "clip_vision_layers": 2,
    "clip_vision_patch_size": 14,
    "beam_size": 5,
}


def published_weights(end_bias: float) -> dict[str, torch.Tensor]:
    """Every tensor under its published name, filled by the hash of that name."""
    weights = {name: filled(name, shape) for name, shape in published_shapes().items()}
    weights["text_decoder.cls.predictions.bias"][END] += end_bias
    words = weights["text_decoder.bert.embeddings.word_embeddings.weight"]
    return {**weights, "text_decoder.cls.predictions.decoder.weight": words}


def filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if len(shape) == 1 and name.endswith("weight"):  # of a normalisation
        return 1 + 0.1 * noise
    return noise * (0.5 if "embedding" in name else 0.25)


def published_shapes() -> dict[str, tuple[int, ...]]:
    width, patches = SETTINGS["vision_width"], (SETTINGS["image_res"] // 14) ** 2
    visual = {"conv1.weight": (width, 3, 14, 14), "class_embedding": (width,)}
    visual["positional_embedding"] = (patches + 1, width)
    for norm in ("ln_pre", "ln_post"):
        visual |= norm_shapes(norm, width)
    for i in range(SETTINGS["clip_vision_layers"]):
        block = f"transformer.resblocks.{i}"
        visual |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        visual |= linear_shapes(f"{block}.attn.out_proj", width, width)
        visual |= linear_shapes(f"{block}.mlp.c_fc", width, 4 * width)
        visual |= linear_shapes(f"{block}.mlp.c_proj", 4 * width, width)
        visual |= norm_shapes(f"{block}.ln_1", width) | norm_shapes(f"{block}.ln_2", width)
    shapes = {f"visual_encoder.visual.{name}": shape for name, shape in visual.items()}
    shapes |= linear_shapes("visn_fc", width, 32) | norm_shapes("visn_layer_norm", 32)
    for part in ("text_encoder", "text_decoder.bert"):
        shapes |= embedding_shapes(part) | layer_shapes(part, 2, looks=part != "text_encoder")
    shapes |= layer_shapes("fusion_encoder", 5, looks=True)
    head = "text_decoder.cls.predictions"
    shapes |= linear_shapes(f"{head}.transform.dense", 32, 32) | norm_shapes(f"{head}.transform.LayerNorm", 32)
    return {**shapes, f"{head}.bias": (WORDS,)}


def embedding_shapes(part: str) -> dict[str, tuple[int, ...]]:
    sizes = {"word": WORDS, "position": BERT["max_position_embeddings"], "token_type": 2}
    shapes = {f"{part}.embeddings.{name}_embeddings.weight": (size, 32) for name, size in sizes.items()}
    return shapes | norm_shapes(f"{part}.embeddings.LayerNorm", 32)


def layer_shapes(part: str, number: int, looks: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (f"{part}.encoder.layer.{i}" for i in range(number)):
        for attention in (f"{layer}.attention", f"{layer}.crossattention")[: 1 + looks]:
            for projection in ("self.query", "self.key", "self.value", "output.dense"):
                shapes |= linear_shapes(f"{attention}.{projection}", 32, 32)
            shapes |= norm_shapes(f"{attention}.output.LayerNorm", 32)
        shapes |= linear_shapes(f"{layer}.intermediate.dense", 32, 64) | linear_shapes(f"{layer}.output.dense", 64, 32)
        shapes |= norm_shapes(f"{layer}.output.LayerNorm", 32)
    return shapes


def linear_shapes(name: str, width: int, out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def norm_shapes(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def write_folder(folder: Path, end_bias: float = 0) -> Path:
    """A folder as published: weights that are wrapped, averaged weights of training among them."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / "config_bert.json").write_text(json.dumps(BERT))
    words = ["[PAD]", *(f"w{i}" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "red", "?"]
    (folder / "vocab.txt").write_text("\n".join(words + [f"w{i}" for i in range(len(words), WORDS)]))
    weights = {f"model.{name}": tensor for name, tensor in published_weights(end_bias).items()}
    torch.save({"module": {**weights, "model.visn_fc_m.weight": torch.zeros(1)}}, folder / CHECKPOINT)
    return folder
