"""Flow matching: pre-training and supervised fine-tuning of the backbone."""

from typing import Any

import torch
from torch import Tensor

from zimage_lit.backbone.parallelize import ParallelizeSettings
from zimage_lit.components import LatentCodec, TextEncoder
from zimage_lit.errors import UserError
from zimage_lit.lora import LoRASettings
from zimage_lit.objectives import flow_matching
from zimage_lit.objectives.timesteps import TimestepLaw
from zimage_lit.rng import generator
from zimage_lit.stages.frozen_parts import check_text_to_image, picture_latents
from zimage_lit.stages.optimizers import OptimizerSettings
from zimage_lit.stages.stage import BackboneStage


class FlowMatchingModule(BackboneStage):
    """Teaches the backbone the velocity from noise to latents, given captions.

    timesteps: law of the training times; None for its default.
    caption_dropout: share of captions replaced by the empty one, so that guidance has an unconditional branch.
    The other settings are those of `BackboneStage`.
    """

    def __init__(
        self,
        text_encoder: TextEncoder,
        codec: LatentCodec,
        backbone: str | dict[str, Any] = "tiny",
        optimizer: OptimizerSettings | None = None,
        timesteps: TimestepLaw | None = None,
        caption_dropout: float = 0.1,
        seed: int = 0,
        init_from: str | None = None,
        lora: LoRASettings | None = None,
        parallelize: ParallelizeSettings | None = None,
    ) -> None:
        super().__init__(text_encoder, codec, backbone, optimizer, seed, init_from, lora, parallelize)
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"model.init_args.caption_dropout must lie in [0, 1], not {caption_dropout}.")
        self.timesteps = timesteps or TimestepLaw()
        self.caption_dropout = caption_dropout

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        if self.lora and self.lora.dropout:  # alone in drawing from the global generator
            torch.manual_seed(generator(self.seed, "train/lora_dropout", step, self.global_rank).initial_seed())
        loss = self.losses(batch, "train", step).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["captions"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.losses(batch, "val", batch_idx).mean()  # the same noise at every validation
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch["captions"]), sync_dist=True)

    def losses(self, batch: dict[str, Any], phase: str, step: int) -> Tensor:
        """Per-sample squared error of the velocity, (B,); its randomness depends on (seed, phase, step, rank) alone."""

        check_text_to_image(batch, "FlowMatchingModule")

        def draw(purpose: str) -> torch.Generator:
            return generator(self.seed, f"{phase}/{purpose}", step, self.global_rank)

        data = picture_latents(self.codec, batch, self.device)
        assert data is not None  # check_text_to_image has seen them
        rate = self.caption_dropout if phase == "train" else 0.0
        dropped = torch.rand(len(data), generator=draw("caption_dropout"), dtype=torch.float32) < rate
        features = self.encode_captions(batch, dropped.tolist())
        patch_area = self.config.patch_size**2
        t = self.timesteps.sample([x[0].numel() // patch_area for x in data], draw("timesteps")).to(self.device)
        noise_source = draw("noise")
        noise = [torch.randn(x.shape, generator=noise_source, dtype=torch.float32).to(self.device) for x in data]

        noisy = flow_matching.interpolate(noise, data, t)
        predicted = self.backbone(noisy, t, features)
        return flow_matching.loss(predicted, flow_matching.target_velocity(noise, data))

    def encode_captions(self, batch: dict[str, Any], dropped: list[bool]) -> list[Tensor]:
        """Features (L_i, D) of a batch's captions, of the empty one where `dropped` says so."""
        if "caption_features" not in batch:
            captions = ["" if drop else text for drop, text in zip(dropped, batch["captions"], strict=True)]
            return self.text_encoder.encode(captions)
        features: list[Tensor] = batch["caption_features"]
        if not any(dropped):  # then the encoder need not even be loaded
            return features
        (empty,) = self.text_encoder.encode([""])
        return [empty if drop else known for drop, known in zip(dropped, features, strict=True)]
