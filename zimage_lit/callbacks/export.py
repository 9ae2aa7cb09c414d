"""What a finished run hands out: a folder that the pipeline loads."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from zimage_lit.callbacks.ema import averaged_weights
from zimage_lit.callbacks.sampling import SamplingSettings, stage_pipeline


class PipelineExport(Callback):
    """Writes `<output_dir>/pipeline/` with the averaged weights when training ends.

    sampling: what the exported pipeline uses where a call does not say otherwise.
    """

    def __init__(self, sampling: SamplingSettings | None = None) -> None:
        self.sampling = sampling or SamplingSettings()

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir) / "pipeline"
        with averaged_weights(trainer, pl_module):
            stage_pipeline(pl_module, self.sampling).save_pretrained(folder)
        rank_zero_info(f"pipeline: {folder}")
