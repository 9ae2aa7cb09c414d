"""mmdet's Mask2Former checkpoints (2.x, Swin backbone) as transformers' Mask2FormerForUniversalSegmentation.

Both are the same network, and the names below say which part of one is which of the other. Three differ in more than
name: queries, keys and values, which mmdet keeps in one matrix where transformers has three; what a patch merging
concatenates (`_merging_order`); and the index of relative positions, which transformers computes.
"""

import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zimage_lit.errors import UserError

# configs/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.py of mmdet 2.27
SWIN_S_BACKBONE: dict[str, Any] = {
    "embed_dim": 96,
    "depths": [2, 2, 18, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
SWIN_S_HEAD: dict[str, Any] = {
    "num_labels": 80,
    "num_queries": 100,
    "feature_size": 256,
    "mask_feature_size": 256,
    "hidden_dim": 256,
    "num_attention_heads": 8,
    "encoder_layers": 6,
    "encoder_feedforward_dim": 1024,
    "decoder_layers": 10,  # transformers counts the prediction before the first of nine layers
    "dim_feedforward": 2048,
    "pre_norm": False,
    "enforce_input_projection": False,
}

# mmdet's name -> transformers'. # is a number, @ is weight or bias, * is q, k and v, the thirds of one tensor.
BACKBONE = {
    "patch_embed.projection.@": "swin.embeddings.patch_embeddings.projection.@",
    "patch_embed.norm.@": "swin.embeddings.norm.@",
    "stages.#.blocks.#.norm1.@": "swin.encoder.layers.#.blocks.#.layernorm_before.@",
    "stages.#.blocks.#.norm2.@": "swin.encoder.layers.#.blocks.#.layernorm_after.@",
    "stages.#.blocks.#.attn.w_msa.qkv.@": "swin.encoder.layers.#.blocks.#.attention.*_proj.@",
    "stages.#.blocks.#.attn.w_msa.proj.@": "swin.encoder.layers.#.blocks.#.attention.o_proj.@",
    "stages.#.blocks.#.attn.w_msa.relative_position_bias_table": (
        "swin.encoder.layers.#.blocks.#.attention.relative_position_bias.relative_position_bias_table"
    ),
    "stages.#.blocks.#.ffn.layers.0.0.@": "swin.encoder.layers.#.blocks.#.mlp.fc1.@",
    "stages.#.blocks.#.ffn.layers.1.@": "swin.encoder.layers.#.blocks.#.mlp.fc2.@",
    "stages.#.downsample.norm.@": "swin.encoder.layers.#.downsample.norm.@",
    "stages.#.downsample.reduction.weight": "swin.encoder.layers.#.downsample.reduction.weight",
    "norm0.@": "hidden_states_norms.stage1.@",
    "norm1.@": "hidden_states_norms.stage2.@",
    "norm2.@": "hidden_states_norms.stage3.@",
    "norm3.@": "hidden_states_norms.stage4.@",
}
PIXEL_DECODER = {
    "input_convs.#.conv.@": "input_projections.#.0.@",
    "input_convs.#.gn.@": "input_projections.#.1.@",
    "encoder.layers.#.attentions.0.sampling_offsets.@": "encoder.layers.#.self_attn.sampling_offsets.@",
    "encoder.layers.#.attentions.0.attention_weights.@": "encoder.layers.#.self_attn.attention_weights.@",
    "encoder.layers.#.attentions.0.value_proj.@": "encoder.layers.#.self_attn.value_proj.@",
    "encoder.layers.#.attentions.0.output_proj.@": "encoder.layers.#.self_attn.output_proj.@",
    "encoder.layers.#.norms.0.@": "encoder.layers.#.self_attn_layer_norm.@",
    "encoder.layers.#.ffns.0.layers.0.0.@": "encoder.layers.#.fc1.@",
    "encoder.layers.#.ffns.0.layers.1.@": "encoder.layers.#.fc2.@",
    "encoder.layers.#.norms.1.@": "encoder.layers.#.final_layer_norm.@",
    "level_encoding.weight": "level_embed",
    "lateral_convs.0.conv.weight": "adapter_1.0.weight",
    "lateral_convs.0.gn.@": "adapter_1.1.@",
    "output_convs.0.conv.weight": "layer_1.0.weight",
    "output_convs.0.gn.@": "layer_1.1.@",
    "mask_feature.@": "mask_projection.@",
}
TRANSFORMER_DECODER = {
    "layers.#.attentions.0.attn.in_proj_@": "layers.#.cross_attn.in_proj_@",
    "layers.#.attentions.0.attn.out_proj.@": "layers.#.cross_attn.out_proj.@",
    "layers.#.norms.0.@": "layers.#.cross_attn_layer_norm.@",
    "layers.#.attentions.1.attn.in_proj_@": "layers.#.self_attn.*_proj.@",
    "layers.#.attentions.1.attn.out_proj.@": "layers.#.self_attn.out_proj.@",
    "layers.#.norms.1.@": "layers.#.self_attn_layer_norm.@",
    "layers.#.ffns.0.layers.0.0.@": "layers.#.fc1.@",
    "layers.#.ffns.0.layers.1.@": "layers.#.fc2.@",
    "layers.#.norms.2.@": "layers.#.final_layer_norm.@",
    "post_norm.@": "layernorm.@",
}
HEAD = {
    "query_feat.weight": "model.transformer_module.queries_features.weight",
    "query_embed.weight": "model.transformer_module.queries_embedder.weight",  # the queries' positions
    "level_embed.weight": "model.transformer_module.level_embed.weight",
    "mask_embed.0.@": "model.transformer_module.decoder.mask_predictor.mask_embedder.0.0.@",
    "mask_embed.2.@": "model.transformer_module.decoder.mask_predictor.mask_embedder.1.0.@",
    "mask_embed.4.@": "model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.@",
    "cls_embed.@": "class_predictor.@",
}
PARTS = (  # prefix of mmdet, of transformers, names
    ("backbone.", "model.pixel_level_module.encoder.", BACKBONE),
    ("panoptic_head.pixel_decoder.", "model.pixel_level_module.decoder.", PIXEL_DECODER),
    ("panoptic_head.transformer_decoder.", "model.transformer_module.decoder.", TRANSFORMER_DECODER),
    ("panoptic_head.", "", HEAD),
)
NAMES = {old + name: new + other for old, new, names in PARTS for name, other in names.items()}
UNUSED = ("criterion.", "model.pixel_level_module.encoder.swin.layernorm.")  # no prediction depends on these


def load_mmdet(file: str | Path, config: Any = None) -> Any:
    """The network of a checkpoint file, in float32 on the CPU, ready to predict.

    config: a Mask2FormerConfig; by default that of mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.

    UserError for a file that is no such checkpoint, with the names of what is missing, unknown or of another shape.
    """
    from transformers import Mask2FormerForUniversalSegmentation

    state = transformers_state(_tensors(Path(file)), file)
    model = Mask2FormerForUniversalSegmentation(config or swin_s_config())
    wanted = model.state_dict()
    missing = sorted(name for name in wanted.keys() - state.keys() if not name.startswith(UNUSED))
    if missing:
        raise UserError(f"{file} does not fill the network: it lacks what becomes {_some(missing)}.")
    surplus = sorted(state.keys() - wanted.keys())
    if surplus:
        raise UserError(f"{file} is of a larger network than its configuration: it has {_some(surplus)}.")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, where its configuration has {tuple(wanted[name].shape)}"
            raise UserError(f"{file} is of another network: what becomes {name} has the shape {shapes}.")
    model.load_state_dict(state, strict=False)
    return model.eval().requires_grad_(False)


def swin_s_config() -> Any:
    """The Mask2FormerConfig of GenEval's detector."""
    from transformers import Mask2FormerConfig, SwinConfig

    return Mask2FormerConfig(backbone_config=SwinConfig(**SWIN_S_BACKBONE), **SWIN_S_HEAD)


def transformers_state(state: Mapping[str, Tensor], file: str | Path = "the checkpoint") -> dict[str, Tensor]:
    """mmdet's tensors by transformers' names. UserError, with `file` and the names, for tensors that have no place."""
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        if name.endswith(".relative_position_index"):
            _check_position_index(file, name, tensor)
            continue
        renamed = _renamed(name)
        if renamed is None:
            unknown.append(name)
        elif "*" in renamed:
            converted |= {renamed.replace("*", one): part for one, part in zip("qkv", tensor.chunk(3), strict=True)}
        elif ".downsample." in renamed:
            converted[renamed] = tensor[..., _merging_order(tensor.shape[-1])]
        else:
            converted[renamed] = tensor
    if unknown:
        raise UserError(f"{file} is no Mask2Former with a Swin backbone of mmdet 2: nothing takes {_some(unknown)}.")
    return {name: tensor.float() for name, tensor in converted.items()}


def _tensors(file: Path) -> Mapping[str, Tensor]:
    """A checkpoint's state dict, read without running any code that a pickle may hold."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{file} cannot be read as weights alone ({reason}): take the file that mmdet publishes."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{file} is no checkpoint of mmdet: it has no state_dict.")
    return content["state_dict"]


def _renamed(name: str) -> str | None:
    for pattern, template in PATTERNS:
        if match := pattern.fullmatch(name):
            return _filled(template, iter(match.groups()))
    return None


def _filled(template: str, groups: Iterator[str]) -> str:
    return re.sub("[#@]", lambda _: next(groups), template)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)").replace("@", "(weight|bias)"))


PATTERNS = [(_pattern(name), template) for name, template in NAMES.items()]


def _merging_order(channels: int) -> Tensor:
    """Where in mmdet's order transformers' i-th channel of a patch merging's 2 x 2 pixels is.

    mmdet unfolds: a channel's four pixels lie side by side, row by row. transformers lays the pixels' channels one
    after the other, column by column.
    """
    return torch.arange(channels).view(-1, 2, 2).permute(2, 1, 0).flatten()  # (channel, row, column) -> reversed


def _check_position_index(file: str | Path, name: str, index: Tensor) -> None:
    """UserError where a window's index of relative positions is not the one that transformers computes."""
    side = round(index.shape[0] ** 0.5)
    rows, columns = torch.arange(side**2) // side, torch.arange(side**2) % side
    down, right = rows[:, None] - rows, columns[:, None] - columns
    if not torch.equal(index.long(), (down + side - 1) * (2 * side - 1) + right + side - 1):
        raise UserError(f"{file} is of another network: its {name} counts relative positions in another order.")


def _some(names: Iterable[str]) -> str:
    first, *others = names
    return f"{first} and {len(others)} more" if others else first
