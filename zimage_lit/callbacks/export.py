"""What a finished run hands out: a folder that the pipeline loads, or files with its LoRA."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from zimage_lit.backbone.parallelize import gathered
from zimage_lit.callbacks.ema import averaged_weights
from zimage_lit.callbacks.sampling import SamplingSettings, joins_in_drawing, stage_pipeline
from zimage_lit.errors import UserError
from zimage_lit.lora import DTYPES, Dialect, adapters_of, apply_lora, write_lora
from zimage_lit.stages.initial_weights import empty_backbone


class PipelineExport(Callback):
    """Writes `<output_dir>/pipeline/` with the averaged weights when training ends, a LoRA merged into its base.

    sampling: what the exported pipeline uses where a call does not say otherwise.
    """

    def __init__(self, sampling: SamplingSettings | None = None) -> None:
        self.sampling = sampling or SamplingSettings()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not joins_in_drawing(trainer):
            return
        folder = Path(trainer.default_root_dir) / "pipeline"
        with averaged_weights(trainer, pl_module), whole_backbone(pl_module, keep=trainer.is_global_zero):
            if trainer.is_global_zero:
                stage_pipeline(pl_module, self.sampling).save_pretrained(folder)
        rank_zero_info(f"pipeline: {folder}")


class LoRAExport(Callback):
    """Writes `<output_dir>/lora/diffusers.safetensors` and `comfyui.safetensors` (not of a DoRA, which ComfyUI would
    draw otherwise) with the averaged adapters when training ends.

    dtype: of the files.
    """

    def __init__(self, dtype: Literal["bfloat16", "float32"] = "bfloat16") -> None:
        self.dtype = DTYPES[dtype]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if getattr(pl_module, "lora", None) is None:
            raise UserError("LoRAExport needs a LoRA: give model.init_args.lora, or use PipelineExport.")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        folder = Path(trainer.default_root_dir) / "lora"
        with averaged_weights(trainer, pl_module):
            adapters = adapters_of(pl_module.backbone)
            dialects: list[Dialect] = ["diffusers"] if pl_module.lora.dora else ["diffusers", "comfyui"]
            if trainer.is_global_zero:
                for dialect in dialects:
                    write_lora(adapters, folder / f"{dialect}.safetensors", dialect, self.dtype)
        rank_zero_info(f"LoRA: {', '.join(str(folder / f'{dialect}.safetensors') for dialect in dialects)}")


@contextmanager
def whole_backbone(pl_module: Any, keep: bool) -> Iterator[None]:
    """Inside, where `keep` is set, a sharded backbone is a whole one on the CPU; every rank has to come here."""
    sharded = pl_module.backbone
    if any(isinstance(weight, DTensor) for weight in sharded.state_dict().values()):
        weights = gathered(sharded, keep)
        if keep:
            pl_module.backbone = empty_backbone(sharded.config)
            if getattr(pl_module, "lora", None):
                apply_lora(pl_module.backbone, pl_module.lora)
            own = pl_module.backbone.state_dict()  # not the adapters of another network on the same base
            pl_module.backbone.load_state_dict({name: weights[name] for name in own}, assign=True)
    try:
        yield
    finally:
        pl_module.backbone = sharded
