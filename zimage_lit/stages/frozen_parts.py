"""What a stage asks of its data and its frozen parts before it trains with what they made."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from zimage_lit.components import LatentCodec, TextEncoder
from zimage_lit.errors import UserError


def prepare_frozen_parts(stage: Any) -> None:
    """Check that a stage's trainer and data go with its codec and text encoder, and move both to the device.

    UserError for a precision that overflows, and where `check_encoded_by` says so. For `LightningModule.setup`.
    """
    trainer = stage.trainer
    if str(trainer.precision) == "16-mixed":  # its scaled gradients would be clipped as if they were not
        raise UserError("trainer.precision=16-mixed overflows in this network: set it to bf16-mixed or 32-true.")
    check_encoded_by(getattr(trainer, "datamodule", None), stage.codec, stage.text_encoder)
    device = trainer.strategy.root_device  # the stage's own is set later, together with the backbone's
    stage.text_encoder.to(device)
    stage.codec.to(device)


def check_encoded_by(datamodule: Any, codec: LatentCodec, text_encoder: TextEncoder) -> None:
    """UserError where the data hold latents or features that this codec or text encoder would not have made.

    `datamodule` may have `encoded_by`: "codec" and "text_encoder" -> fingerprint of the one that was used.
    """
    known: dict[str, str] = getattr(datamodule, "encoded_by", {})
    parts: dict[str, LatentCodec | TextEncoder] = {"codec": codec, "text_encoder": text_encoder}
    for name, part in parts.items():
        if name in known and known[name] != part.fingerprint():
            made = "latents" if name == "codec" else "caption features"
            raise UserError(
                f"The data hold {made} of another {name} than model.init_args.{name}: name the one that they were made "
                "with, or run `encode` again with this one."
            )


def check_text_to_image(names: Collection[str], stage: str, pictures: bool = True) -> None:
    """UserError where a batch, by its names, is not of captions and (if a stage needs them) pictures alone: of an
    editing batch, a stage that does not know the source would learn to draw the target from "make it red"."""
    lacking = pictures and not {"images", "image_latents"} & set(names)
    if {"sources", "source_latents"} & set(names) or lacking or "captions" not in names:
        raise UserError(
            f"{stage} learns from {'pictures and ' if pictures else ''}captions, and the data give {', '.join(names)}: "
            "name other data, or a stage that learns from these."
        )


def check_preference(names: Collection[str], stage: str) -> None:
    """UserError where a batch, by its names, is not of pairs of pictures, one preferred, and their captions."""
    if any(not {f"{role}s", f"{role}_latents"} & set(names) for role in ("winner", "loser")) or "captions" not in names:
        raise UserError(
            f"{stage} learns from winners and losers with captions, and the data give {', '.join(names)}: set "
            "data.class_path to data_modules.PreferenceDataModule with such data, or name another stage."
        )


def caption_features(text_encoder: TextEncoder, batch: Mapping[str, Any]) -> list[Tensor]:
    """Features (L_i, D) of a batch's captions: those of the data where they have them."""
    return batch["caption_features"] if "caption_features" in batch else text_encoder.encode(batch["captions"])


@torch.no_grad()
def picture_latents(
    codec: LatentCodec, batch: Mapping[str, Any], device: torch.device, role: str = "image"
) -> list[Tensor] | None:
    """Latents (C, h, w) of a batch's pictures of a role (image, winner, loser), None where it has none."""
    if f"{role}_latents" in batch:
        latents: list[Tensor] = batch[f"{role}_latents"]
        return latents
    return encode_images(codec, batch[f"{role}s"], device) if f"{role}s" in batch else None


def encode_images(codec: LatentCodec, images: list[Tensor], device: torch.device) -> list[Tensor]:
    """uint8 (3, H, W) pictures of any sizes -> latents (C, h, w); pictures of one size share a call."""
    latents: dict[int, Tensor] = {}
    for shape in {image.shape for image in images}:
        places = [i for i, image in enumerate(images) if image.shape == shape]
        stacked = torch.stack([images[i] for i in places]).to(device)
        latents.update(zip(places, codec.encode(stacked.float() / 127.5 - 1), strict=True))
    return [latents[i] for i in range(len(images))]
