"""Rewards that are CLIP-type networks, read from local folders by transformers: alignment, aesthetics, preference."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from zimage_lit.components import fingerprint
from zimage_lit.errors import UserError
from zimage_lit.rewards.contract import Metadata, RewardCallback
from zimage_lit.rewards.pictures import as_pil


class CLIPReward(RewardCallback):
    """Cosine of a picture's and its prompt's features under CLIP, SigLIP or any of their kind.

    folder: model, tokenizer and image processor, as `save_pretrained` writes them.
    processor: folder of tokenizer and image processor, where it is another one.
    scaled: multiply by the model's own temperature (100 in most), as PickScore does.
    differentiable: the picture is resized and normalised in floating point, so that the score has a gradient; of
        finished pictures the scores then differ slightly from those of the processor.

    Prompts longer than the model reads are cut. Raises UserError for a folder that holds no such model.
    """

    def __init__(
        self,
        folder: str,
        processor: str | None = None,
        scaled: bool = False,
        differentiable: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.folder = folder
        self.processor = processor
        self.scaled = scaled
        self.differentiable = differentiable

    def load(self) -> None:
        self._features = CLIPFeatures(f"the reward {self.name}", self.folder, self.processor or self.folder)
        self.model = self._features.model  # placed and frozen with the reward

    @property
    def version(self) -> str:
        return f"{type(self).__name__} {self._features.fingerprint}" if self._prepared else super().version

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        seen = self._features.of_images(images, self.differentiable)
        cosine = (seen * self._features.of_texts(prompts)).sum(-1)
        return cosine * self.model.logit_scale.exp() if self.scaled else cosine


class PickScoreReward(CLIPReward):
    """PickScore: the model's temperature times the cosine (Kirstain et al., arXiv 2305.01569).

    folder: of PickScore_v1.   processor: of CLIP-ViT-H-14-laion2B-s32B-b79K, whose tokenizer and processor it uses.
    """

    def __init__(
        self, folder: str, processor: str | None = None, differentiable: bool = False, **settings: Any
    ) -> None:
        super().__init__(folder, processor, scaled=True, differentiable=differentiable, **settings)


class HPSReward(CLIPReward):
    """Human Preference Score v2: the cosine under its CLIP (Wu et al., arXiv 2306.09341).

    folder: the weights in transformers' form, with their tokenizer and image processor.
    """

    def __init__(
        self, folder: str, processor: str | None = None, differentiable: bool = False, **settings: Any
    ) -> None:
        super().__init__(folder, processor, scaled=False, differentiable=differentiable, **settings)


class AestheticReward(RewardCallback):
    """A head of linear layers on CLIP's normalised picture features: LAION's aesthetic predictors, about 1 to 10.

    folder: of the CLIP that the head was trained on, such as clip-vit-large-patch14.
    head: the head's weights, .safetensors or .pth; its layers, which have no activations between them, are found by
        their shapes.
    differentiable: see CLIPReward.
    """

    def __init__(self, folder: str, head: str, differentiable: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.folder = folder
        self.head = head
        self.differentiable = differentiable

    def load(self) -> None:
        self._features = CLIPFeatures(f"the reward {self.name}", self.folder, self.folder)
        self.model = self._features.model
        config = self.model.config
        width = getattr(config, "projection_dim", config.vision_config.hidden_size)  # SigLIP projects nothing
        self.layers = linear_layers(self.name, Path(self.head), width)

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return self.layers(self._features.of_images(images, self.differentiable))[:, 0]


class CLIPFeatures:
    """Normalised features (B, D) of pictures and texts.

    owner: whose sentence an error is, such as "the reward clip".
    """

    def __init__(self, owner: str, folder: str, processor_folder: str) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer  # takes seconds: only who needs it pays

        for place in (folder, processor_folder):
            if not Path(place).is_dir():
                raise UserError(f"{owner}: there is no folder {place}: download the model there.")
        try:
            self.model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
            self.tokenizer = AutoTokenizer.from_pretrained(processor_folder, local_files_only=True)
            self.processor = AutoImageProcessor.from_pretrained(processor_folder, local_files_only=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{owner}: {folder} cannot be loaded ({str(error).splitlines()[0]}).") from error
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise UserError(f"{owner}: {folder} holds a {type(self.model).__name__}, which is no CLIP.")
        self.folder = folder

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.folder)[:16]

    def of_images(self, images: Sequence[Tensor], differentiable: bool) -> Tensor:
        """images: uint8 (3, H, W), or float in [-1, 1] where `differentiable`."""
        if differentiable:
            return self.of_pixels(torch.stack([self.prepared(image) for image in images]))
        return self.of_pixels(self.processor([as_pil(image) for image in images], return_tensors="pt")["pixel_values"])

    def of_pixels(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, H, W), resized, cropped and normalised as the network wants them."""
        found = self.model.get_image_features(pixel_values=pixels.to(self.model.device))
        return normalize(found.pooler_output, dim=-1)

    def of_texts(self, prompts: Sequence[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        # SigLIP has learnt on texts that are filled up to their full length
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        tokens = self.tokenizer(
            list(prompts), padding=padding, truncation=True, max_length=longest, return_tensors="pt"
        ).to(self.model.device)
        return normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)

    def prepared(self, image: Tensor) -> Tensor:
        """What the image processor does (resize, crop from the middle, normalise), with a gradient."""
        settings = self.processor
        pixels = (image + 1) / 2
        if settings.do_resize:
            size = resized(image.shape[1], image.shape[2], settings.size)
            mode = {2: "bilinear", 3: "bicubic"}[int(settings.resample)]
            pixels = interpolate(pixels[None], size, mode=mode, antialias=True)[0].clamp(0, 1)
        if getattr(settings, "do_center_crop", False):
            height, width = settings.crop_size["height"], settings.crop_size["width"]
            top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
            pixels = pixels[:, top : top + height, left : left + width]
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
        return (pixels - mean) / std


def resized(height: int, width: int, size: Any) -> tuple[int, int]:
    """(height, width) after a resize to a shortest edge, or to a fixed size."""
    if "height" in size:
        return size["height"], size["width"]
    edge = size["shortest_edge"]
    if height <= width:
        return edge, int(edge * width / height)
    return int(edge * height / width), edge


def linear_layers(name: str, path: Path, width: int) -> nn.Sequential:
    """The linear layers of a file in their order. UserError for one that does not go from `width` to one number."""
    if not path.is_file():
        raise UserError(f"the reward {name}: there is no head {path}: download it there.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        weights = load_file(path)
    else:
        weights = torch.load(path, map_location="cpu", weights_only=True)  # a pickle, read as tensors alone
    names = sorted((key.removesuffix("weight") for key in weights if key.endswith("weight")), key=layer_number)
    shapes = [tuple(weights[f"{key}weight"].shape) for key in names]
    outputs = [shape[0] for shape in shapes]
    if [shape[1] for shape in shapes] != [width, *outputs[:-1]] or outputs[-1:] != [1]:
        raise UserError(f"the reward {name}: the layers {shapes} of {path} do not lead from {width} numbers to one.")
    layers = nn.Sequential(*(nn.Linear(before, after) for after, before in shapes))
    for layer, key in zip(layers, names, strict=True):
        layer.load_state_dict({part: weights[f"{key}{part}"].float() for part in ("weight", "bias")})
    return layers


def layer_number(key: str) -> tuple[int, ...]:
    """`layers.10.` -> (10,): the order of a Sequential, which is not that of the alphabet."""
    return tuple(int(part) for part in key.split(".") if part.isdigit())
