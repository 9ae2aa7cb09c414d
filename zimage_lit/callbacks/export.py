"""What a finished run hands out: a folder that the pipeline loads."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.distributed.tensor import DTensor

from zimage_lit.backbone.parallelize import gathered
from zimage_lit.callbacks.ema import averaged_weights
from zimage_lit.callbacks.sampling import SamplingSettings, joins_in_drawing, stage_pipeline
from zimage_lit.stages.initial_weights import empty_backbone


class PipelineExport(Callback):
    """Writes `<output_dir>/pipeline/` with the averaged weights when training ends.

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


@contextmanager
def whole_backbone(pl_module: Any, keep: bool) -> Iterator[None]:
    """Inside, where `keep` is set, a sharded backbone is a whole one on the CPU; every rank has to come here."""
    sharded = pl_module.backbone
    if any(isinstance(weight, DTensor) for weight in sharded.state_dict().values()):
        weights = gathered(sharded, keep)
        if keep:
            pl_module.backbone = empty_backbone(sharded.config)
            pl_module.backbone.load_state_dict(weights, assign=True)
    try:
        yield
    finally:
        pl_module.backbone = sharded
