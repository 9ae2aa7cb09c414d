"""Flow matching: pre-training and supervised fine-tuning of the backbone."""

import math
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from zimage_lit.backbone import S3DiT
from zimage_lit.backbone.parallelize import ParallelizeSettings
from zimage_lit.components import LatentCodec, TextEncoder
from zimage_lit.errors import UserError
from zimage_lit.lora import (
    TRAINED,
    LoRASettings,
    base_fingerprint,
    base_weights,
    check_adapter_types,
    is_adapter,
    kept_weights,
)
from zimage_lit.objectives import flow_matching
from zimage_lit.objectives.timesteps import TimestepLaw
from zimage_lit.rng import generator
from zimage_lit.stages.frozen_parts import check_encoded_by, check_text_to_image, encode_images
from zimage_lit.stages.initial_weights import backbone_config, check_continues, stage_backbone
from zimage_lit.stages.optimizers import LearningRate, OptimizerSettings, build_optimizer


class FlowMatchingModule(LightningModule):
    """Teaches the backbone the velocity from noise to latents, given captions.

    backbone: a preset's name, a folder with a backbone of the wanted sizes, or `preset` and the sizes that differ.
    optimizer, timesteps: None for their defaults.
    init_from: a checkpoint, an exported folder or `run:<mlflow run id>` to start from.
    caption_dropout: share of captions replaced by the empty one, so that guidance has an unconditional branch.
    lora: None trains all weights. With LoRA the others are frozen and not in the checkpoints, so `init_from` must stay
        where it is as long as the run is continued or drawn from.
    parallelize: activation checkpointing and compiling; None for neither. Under the strategy `fsdp2` the backbone is
        sharded as well: made without memory, and filled part by part.
    """

    hands_over_gradient_norm = True  # to callbacks that have `on_gradient_norm`

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
        super().__init__()
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"model.init_args.caption_dropout must lie in [0, 1], not {caption_dropout}.")
        self.text_encoder = text_encoder
        self.codec = codec
        self.config = backbone_config(backbone)
        self.optimizer_settings = optimizer or OptimizerSettings()
        self.timesteps = timesteps or TimestepLaw()
        self.caption_dropout = caption_dropout
        self.seed = seed
        self.init_from = init_from
        self.lora = lora
        self.lora_base: str | None = None  # fingerprint of the frozen weights
        self.strict_loading = lora is None  # check_continues has compared the names
        self.parallelize = parallelize or ParallelizeSettings()
        self.backbone: S3DiT = None  # type: ignore[assignment]  # configure_model makes it, on the trainer's terms

    def configure_model(self) -> None:
        if self.backbone is not None:
            return
        if self.device_mesh is not None:
            self.check_can_be_sharded()
        adapters = {TRAINED: self.lora} if self.lora else {}
        self.backbone = stage_backbone(self, self.init_from, adapters, self.lora.frozen_dtype if self.lora else None)
        if self.lora:
            self.lora_base = base_fingerprint(base_weights(self.backbone))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What checkpoints hold: of a LoRA run the adapters alone."""
        state = super().state_dict(*args, **kwargs)
        return {name: weight for name, weight in state.items() if is_adapter(name)} if self.lora else state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.lora:
            checkpoint["lora_base"] = self.lora_base

    def check_can_be_sharded(self) -> None:
        """UserError for settings that need whole weights."""
        if self.optimizer_settings.name == "muon":
            raise UserError(
                "optimizer.name=muon orthogonalises whole matrices, and trainer.strategy=fsdp2 keeps parts of them on "
                "each device: set optimizer.name=adamw."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_base(checkpoint)
        check_continues(checkpoint, self.backbone, self.optimizer_settings)

    def check_base(self, checkpoint: dict[str, Any]) -> None:
        """UserError where the adapters of a checkpoint were trained on other frozen weights than those here."""
        if self.lora and checkpoint.get("lora_base", self.lora_base) != self.lora_base:
            raise UserError(
                f"the checkpoint holds adapters of other frozen weights than those of init_from={self.init_from}: put "
                "the right ones back there, or name them."
            )

    def setup(self, stage: str) -> None:
        if str(self.trainer.precision) == "16-mixed":  # its scaled gradients would be clipped as if they were not
            raise UserError("trainer.precision=16-mixed overflows in this network: set it to bf16-mixed or 32-true.")
        check_encoded_by(getattr(self.trainer, "datamodule", None), self.codec, self.text_encoder)
        device = self.trainer.strategy.root_device  # our own is set later, together with the backbone's
        self.text_encoder.to(device)
        self.codec.to(device)

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

        data = (
            batch["image_latents"]
            if "image_latents" in batch
            else encode_images(self.codec, batch["images"], self.device)
        )
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

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip and log the norm; Lightning's own clipping refuses the fused AdamW under mixed precision."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(f"trainer.gradient_clip_algorithm must be norm, not {gradient_clip_algorithm}.")
        limit = float(gradient_clip_val or math.inf)  # 0 means none to Lightning, too
        norm = torch.nn.utils.clip_grad_norm_(self.backbone.parameters(), limit)
        if isinstance(norm, DTensor):  # of all shards together, still in parts
            norm = norm.full_tensor()
        self.log("train/gradient_norm", norm)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it without declaring it
            if hasattr(callback, "on_gradient_norm"):
                callback.on_gradient_norm(self.trainer, self, optimizer, norm)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # Lightning would hold the gradients until after the next forward

    def total_steps(self) -> int:
        """Optimiser steps of the run, which a learning rate that decays must know; 0 where it has no end."""
        steps = self.trainer.estimated_stepping_batches
        if steps != math.inf:
            return int(steps)
        if self.optimizer_settings.decay != "constant":
            raise UserError(
                f"optimizer.decay={self.optimizer_settings.decay} needs an end of training: give trainer.max_steps or "
                "trainer.max_epochs, or set it to constant."
            )
        return 0

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        total_steps = self.total_steps()
        if self.lora:
            check_adapter_types(kept_weights(self.backbone))
        optimizer = build_optimizer(self.backbone, self.optimizer_settings, self.seed)
        schedule = LearningRate(optimizer, total_steps, self.optimizer_settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
