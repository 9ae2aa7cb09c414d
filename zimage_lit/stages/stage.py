"""What the stages that train one backbone with one optimiser have in common."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from zimage_lit.backbone import S3DiT
from zimage_lit.backbone.parallelize import ParallelizeSettings
from zimage_lit.components import LatentCodec, TextEncoder
from zimage_lit.errors import UserError
from zimage_lit.lora import (
    TRAINED,
    LoRASettings,
    adapter_of,
    base_fingerprint,
    base_weights,
    check_adapter_types,
    kept_weights,
)
from zimage_lit.stages.frozen_parts import prepare_frozen_parts
from zimage_lit.stages.gradients import clip_gradients
from zimage_lit.stages.initial_weights import backbone_config, check_continues, stage_backbone
from zimage_lit.stages.optimizers import LearningRate, OptimizerSettings, build_optimizer, check_can_shard
from zimage_lit.stages.snapshots import (
    FrozenType,
    Snapshot,
    SnapshotKind,
    adapters_of_stage,
    check_frozen_dtype,
    check_snapshots,
    make_snapshots,
)


class BackboneStage(LightningModule):
    """A backbone, trained whole or by LoRA, beside its frozen text encoder and codec.

    backbone: a preset's name, a folder with a backbone of the wanted sizes, or `preset` and the sizes that differ.
    optimizer: None for its defaults.
    init_from: a checkpoint, an exported folder or `run:<mlflow run id>` to start from.
    lora: None trains all weights. With LoRA the others are frozen and not in the checkpoints, so `init_from` must stay
        where it is as long as the run is continued or drawn from.
    parallelize: activation checkpointing and compiling; None for neither. Under the strategy `fsdp2` the backbone is
        sharded as well: made without memory, and filled part by part.
    snapshots: name -> kind of the earlier weights that the stage needs in training (`self.snapshots`); see
        `snapshots.py`.
    frozen_dtype: of a frozen copy of the whole network among them; None for the trainer's.
    """

    hands_over_gradient_norm = True  # to callbacks that have `on_gradient_norm`

    def __init__(
        self,
        text_encoder: TextEncoder,
        codec: LatentCodec,
        backbone: str | dict[str, Any],
        optimizer: OptimizerSettings | None,
        seed: int,
        init_from: str | None,
        lora: LoRASettings | None,
        parallelize: ParallelizeSettings | None,
        snapshots: Mapping[str, SnapshotKind] | None = None,
        frozen_dtype: FrozenType | None = None,
    ) -> None:
        super().__init__()
        self.snapshot_kinds = snapshots or {}
        check_frozen_dtype(frozen_dtype, lora, self.snapshot_kinds)
        self.frozen_dtype = frozen_dtype
        self.snapshots: dict[str, Snapshot] = {}  # configure_model makes them
        self.text_encoder = text_encoder
        self.codec = codec
        self.config = backbone_config(backbone)
        self.optimizer_settings = optimizer or OptimizerSettings()
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
            check_can_shard(self.optimizer_settings)
        kinds = self.snapshot_kinds if self._trainer is not None else {}  # who only draws pictures needs none
        adapters = adapters_of_stage(self.lora, kinds)
        self.backbone = stage_backbone(self, self.init_from, adapters, self.lora.frozen_dtype if self.lora else None)
        if self.lora:
            self.lora_base = base_fingerprint(base_weights(self.backbone))
        self.snapshots = make_snapshots(self, kinds, self.frozen_dtype)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What checkpoints hold: nothing frozen, so of a LoRA run the adapters alone; of snapshots those that move, as
        `<snapshot's name>.…`."""
        state = super().state_dict(*args, **kwargs)
        if self.lora:
            state = {name: weight for name, weight in state.items() if adapter_of(name) == TRAINED}
        copies = tuple(f"{name}." for name in self.snapshots)
        own = {name: weight for name, weight in state.items() if not name.startswith(copies)}
        moved = {name: snapshot.kept() for name, snapshot in self.snapshots.items()}
        return own | {f"{name}.{key}": weight for name, kept in moved.items() for key, weight in kept.items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.snapshots:
            return super().load_state_dict(state_dict, *args, **kwargs)
        with torch.no_grad():
            for name, target in self.state_dict().items():
                target.copy_(state_dict[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.lora:
            checkpoint["lora_base"] = self.lora_base
        checkpoint["snapshots"] = {name: snapshot.fingerprint for name, snapshot in self.snapshots.items()}
        checkpoint["snapshot_types"] = {name: snapshot.dtype for name, snapshot in self.snapshots.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_base(checkpoint)
        self.check_snapshots(checkpoint)
        check_continues(checkpoint, self.backbone, self.optimizer_settings)

    def check_snapshots(self, checkpoint: dict[str, Any]) -> None:
        """UserError where a checkpoint was trained beside other earlier weights than those here."""
        check_snapshots(checkpoint, self.snapshots, self.init_from)

    def check_base(self, checkpoint: dict[str, Any]) -> None:
        """UserError where the adapters of a checkpoint were trained on other frozen weights than those here."""
        if self.lora and checkpoint.get("lora_base", self.lora_base) != self.lora_base:
            raise UserError(
                f"the checkpoint holds adapters of other frozen weights than those of init_from={self.init_from}: put "
                "the right ones back there, or name them."
            )

    def setup(self, stage: str) -> None:
        prepare_frozen_parts(self)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by our own function and log the norm."""
        if gradient_clip_algorithm not in (None, "norm"):
            raise UserError(f"trainer.gradient_clip_algorithm must be norm, not {gradient_clip_algorithm}.")
        norm = clip_gradients(self, optimizer, self.backbone.parameters(), gradient_clip_val)
        self.log("train/gradient_norm", norm)

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
