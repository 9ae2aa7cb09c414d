"""OneIG-Bench's style: how alike a picture's style is to the reference pictures of a style, by two encoders.

CSD (Contrastive Style Descriptors, Somepalli et al., arXiv 2404.01292; repository learn2phoenix/CSD) is OpenAI's CLIP
ViT-L/14 picture tower, trained further, with two projections of which one is for style. The other encoder is the
benchmark's own, a CLIPVisionModelWithProjection of transformers. How they are used is read from the benchmark's
scripts (scripts/style and scripts/utils of OneIG-Benchmark): CSD in float32 on pictures that torchvision resizes and
crops to 224, the other in bfloat16 on what CLIP's image processor makes of them with its defaults. The scripts round
the other's cosines to bfloat16 too, which is not repeated.

That the conversion of CSD's weights gives what OpenAI's tower computes is tested on a small tower of the same kind;
the published checkpoint itself has not been run here.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision import transforms

from evaluation.judges.checkpoints import filled, read_folder, read_pickle
from evaluation.judges.contract import Asked, JudgeRecord
from evaluation.judges.weights import file_sha256, folder_revision, library_versions
from zimage_lit.errors import UserError
from zimage_lit.files import read_json
from zimage_lit.pipeline import usable_device

CSD_SIZES = {"width": 1024, "layers": 24, "patch": 14, "side": 224, "features": 768}  # ViT-L/14's, of the published one
ENCODER_FEATURES = 1280
REFERENCES = {  # encoder -> digest of the benchmark's reference features (see `references_digest`)
    "csd": "1afbbac0dbffd49268cc83c62565e4f9789ed4acdc68dfe7b7102e408fb6356e",
    "se": "4a448defbbe808b325e030ebefdd70f1f95822c74959b3b32f89e8a53756040c",
}
FILES = {"csd": "CSD_embed", "se": "SE_embed"}  # of the references, below their folder
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # of every CLIP tower
RENAMED = {  # start of a name in OpenAI's package -> in transformers'
    "conv1.weight": "embeddings.patch_embedding.weight",
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
    "transformer.resblocks": "encoder.layers",
}
RENAMED_WITHIN = {  # a block's part
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class StyleJudge:
    """Role `style`: the cosines of a picture's features and those of the style's reference pictures.

    csd: CSD's checkpoint.pth.
    encoder: the folder of xingpng/OneIG-StyleEncoder.
    references: the benchmark's scripts/style, with CSD_embed.pt and SE_embed.pt (or each as .npy with a list of the
        styles' names in `_keys.json`).
    device: what it computes on; by default a GPU where there is one.

    No SHA-256 of the two networks' published files is known here: they are told by their sizes, and count as the
    benchmark's where these are right; the reference features are told by their values. One picture is seen at a time.
    """

    def __init__(self, csd: str, encoder: str, references: str, device: str | None = None) -> None:
        self.csd = csd
        self.encoder = encoder
        self.references = references
        self.device = device

    def record(self) -> JudgeRecord:
        """UserError for a file or folder that is absent or holds something else."""
        parts = [file_sha256(self.csd)[:16], folder_revision(self.encoder)]
        digests = {name: references_digest(self._references[name]) for name in FILES}
        return JudgeRecord(
            judge=type(self).__name__,
            model="CSD ViT-L/14 and xingpng/OneIG-StyleEncoder",
            revision="+".join(parts),
            differs=self._differs(digests),
            settings={"references": digests, "precision": {"csd": "float32", "se": "bfloat16"}},
            versions=library_versions("torch", "torchvision", "transformers", "pillow"),
        )

    def judge(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """Questions {"style"} -> {"csd", "se"}: three cosines each. UserError for a style without references."""
        return [self._cosines(one.pictures[0], one.question["style"]) for one in asked]

    def _cosines(self, picture: Image.Image, style: str) -> dict[str, list[float]]:
        found = {}
        for name, encoder in (("csd", self._csd), ("se", self._encoder)):
            references = self._references[name]
            if style not in references:
                raise UserError(f"{self.references} has no reference features of the style {style}: check the folder.")
            features = encoder(picture)  # rounded to bfloat16 for `se`, as its references are
            found[name] = [float(cosine) for cosine in references[style].float() @ features.float().cpu()]
        return found

    @cached_property
    def _csd(self) -> "CSDEncoder":
        return CSDEncoder(self.csd, usable_device(self.device))

    @cached_property
    def _encoder(self) -> "StyleEncoder":
        return StyleEncoder(self.encoder, usable_device(self.device))

    @cached_property
    def _references(self) -> dict[str, dict[str, Tensor]]:
        return {name: read_references(Path(self.references) / file) for name, file in FILES.items()}

    def _differs(self, digests: Mapping[str, str]) -> str:
        tensors = csd_tensors(self.csd, mmap=True)
        sizes = {**tower_sizes(tensors.tower), "features": tensors.projection.shape[1]}
        features = encoder_config(self.encoder).get("projection_dim")
        if sizes != CSD_SIZES:
            return f"its CSD has {sizes}, the benchmark's {CSD_SIZES}"
        if features != ENCODER_FEATURES:
            return f"its style encoder has {features} features, xingpng/OneIG-StyleEncoder {ENCODER_FEATURES}"
        if digests != REFERENCES:
            return "its reference features are not the benchmark's CSD_embed.pt and SE_embed.pt"
        return ""


class CSDEncoder:
    """A picture -> normalised style features (D,). UserError for a checkpoint that is not CSD's.

    file: checkpoint.pth, with "model_state_dict".
    """

    def __init__(self, file: str, device: torch.device) -> None:
        tensors = csd_tensors(file)
        self.device = device
        self.tower = openai_tower(tensors.tower, file).to(device)
        self.projection = tensors.projection.float().to(device)
        side = self.tower.config.image_size
        self.prepare = transforms.Compose(
            [
                transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(CLIP_MEAN, CLIP_STD),
            ]
        )

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Tensor:
        pixels = self.prepare(picture)[None].to(self.device)
        return normalize(self.tower(pixel_values=pixels).pooler_output @ self.projection, dim=-1)[0]


class StyleEncoder:
    """A picture -> normalised features (D,) in bfloat16. UserError for a folder that holds no such network.

    folder: config.json and weights of a CLIPVisionModelWithProjection.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        network: Any = CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(encoder_config(folder)))
        tensors = read_folder(folder)
        tensors.pop("vision_model.embeddings.position_ids", None)  # older files hold these counted numbers too
        self.network = filled(network, tensors, folder).to(device, torch.bfloat16)
        side = network.config.image_size
        # on PIL's own resizing, as at the time of the benchmark; its defaults are for 224 pixels
        self.prepare = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        self.device = device

    @torch.inference_mode()
    def __call__(self, picture: Image.Image) -> Tensor:
        pixels = self.prepare(images=picture, return_tensors="pt").pixel_values
        return normalize(self.network(pixel_values=pixels.to(self.device, torch.bfloat16)).image_embeds, dim=-1)[0]


class CSDTensors(NamedTuple):
    """tower: of OpenAI's picture tower, by its own names.   projection: (width, D), to the features for style."""

    tower: dict[str, Tensor]
    projection: Tensor


def csd_tensors(file: str, mmap: bool = False) -> CSDTensors:
    """What CSD's checkpoint holds. UserError for other files.   mmap: read when used."""
    content = read_pickle(file, mmap)
    tensors = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(tensors, dict):
        raise UserError(f"{file} is no checkpoint of CSD: it has no model_state_dict.")
    named = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}  # written by several processes
    tower = {name.removeprefix("backbone."): t for name, t in named.items() if name.startswith("backbone.")}
    if not {"conv1.weight", "positional_embedding"} <= tower.keys() or "last_layer_style" not in named:
        raise UserError(f"{file} is no checkpoint of CSD: it has no CLIP tower with a projection for style.")
    return CSDTensors(tower, named["last_layer_style"])


def tower_sizes(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Sizes of OpenAI's picture tower, from its tensors' shapes."""
    width, _, patch, _ = tensors["conv1.weight"].shape
    grid = round((len(tensors["positional_embedding"]) - 1) ** 0.5)
    layers = sum(name.endswith("attn.in_proj_weight") for name in tensors)
    return {"width": width, "layers": layers, "patch": patch, "side": grid * patch}


def openai_tower(tensors: Mapping[str, Tensor], source: str) -> Any:
    """OpenAI's CLIP picture tower, by the names of its own package (clip/model.py), as transformers' CLIPVisionModel.

    What the projection is applied to is its `pooler_output`. UserError for tensors that do not fit.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = tower_sizes(tensors)
    config = CLIPVisionConfig(
        hidden_size=sizes["width"],
        intermediate_size=4 * sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["width"] // HEAD_WIDTH,
        image_size=sizes["side"],
        patch_size=sizes["patch"],
        hidden_act="quick_gelu",
    )
    renamed = {name: t.float() for old, tensor in tensors.items() for name, t in transformers_names(old, tensor)}
    return filled(CLIPVisionModel(config), renamed, source)


def transformers_names(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor of OpenAI's tower under transformers' name; the one for queries, keys and values becomes three."""
    for old, new in RENAMED.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in RENAMED_WITHIN.items():
        name = name.replace(f".{old}.", f".{new}.")
    before, fused, kind = name.partition("attn.in_proj_")
    if not fused:
        return [(name, tensor)]
    return [
        (f"{before}self_attn.{part}_proj.{kind}", third) for part, third in zip("qkv", tensor.chunk(3), strict=True)
    ]


def encoder_config(folder: str) -> dict[str, Any]:
    """The style encoder's sizes: its config.json, or of a whole CLIP the part for pictures."""
    config = read_json(Path(folder) / "config.json", "download xingpng/OneIG-StyleEncoder there")
    return config.get("vision_config", config)


def read_references(stem: Path) -> dict[str, Tensor]:
    """Style -> features of its reference pictures (3, D). UserError for files that are absent or hold something else.

    stem: the path without its ending: .pt, or .npy (styles, 3, D) with `_keys.json`.
    """
    pickled, plain = stem.with_name(f"{stem.name}.pt"), stem.with_name(f"{stem.name}.npy")
    if plain.is_file() and not pickled.is_file():
        try:
            names = json.loads(stem.with_name(f"{stem.name}_keys.json").read_text())
            return dict(zip(names, torch.from_numpy(np.load(plain)), strict=True))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{plain} and its _keys.json cannot be read ({error}): download them again.") from None
    found = read_pickle(pickled)
    if not isinstance(found, dict) or not all(
        torch.is_tensor(tensor) and tensor.ndim == 2 for tensor in found.values()
    ):
        raise UserError(f"{pickled} does not hold features for each style: download it again from OneIG-Benchmark.")
    return found


def references_digest(references: Mapping[str, Tensor]) -> str:
    """SHA-256 over the styles' names, in order, each with its features in float32: the same for .pt and .npy."""
    digest = hashlib.sha256()
    for style in sorted(references):
        digest.update(style.encode() + references[style].float().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()
