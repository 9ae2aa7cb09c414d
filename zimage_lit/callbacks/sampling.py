"""How callbacks draw pictures with the model in training: settings, and one function."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule, Trainer
from PIL import Image

from zimage_lit.callbacks.ema import averaged_weights
from zimage_lit.pipeline import ZImagePipeline
from zimage_lit.sampling import check_guidance, check_schedule, check_solver
from zimage_lit.strategies import FSDP2Strategy


@dataclass
class SamplingSettings:
    """One set of sampling settings for grids, scores and the exported pipeline.

    Raises UserError for steps, a shift or guidance that make no sense, before anything is trained.
    """

    height: int = 64  # pixels
    width: int = 64  # pixels
    num_inference_steps: int = 20
    guidance_scale: float = 3.0  # 1 = none
    cfg_start: float = 0.0  # no guidance before this t (0 = noise, 1 = clean)
    shift: float = 1.0  # static shift of the noise schedule
    solver: str = "euler"  # euler, heun or cps
    eta: float = 0.0  # share of the noise that cps draws anew at each step
    batch_size: int = 64  # pictures drawn at once

    def __post_init__(self) -> None:
        check_schedule(self.num_inference_steps, self.shift)
        check_solver(self.solver, self.eta)
        check_guidance(self.guidance_scale, cfg_start=self.cfg_start)


def stage_pipeline(pl_module: Any, settings: SamplingSettings) -> ZImagePipeline:
    """The parts of a stage (its backbone, text_encoder and codec) as a pipeline whose defaults are `settings`."""
    return ZImagePipeline(
        pl_module.backbone,
        pl_module.text_encoder,
        pl_module.codec,
        shift=settings.shift,
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        cfg_start=settings.cfg_start,
        solver=settings.solver,
        eta=settings.eta,
    )


def joins_in_drawing(trainer: Trainer) -> bool:
    """Whether this process draws: the first one, and where the backbone is sharded all of them, for each forward
    gathers the weights from all. They draw the same; the first one alone writes."""
    return trainer.is_global_zero or isinstance(trainer.strategy, FSDP2Strategy)


@torch.no_grad()
def draw_pictures(
    trainer: Trainer,
    pl_module: LightningModule,
    settings: SamplingSettings,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> list[Image.Image]:
    """One picture per prompt with the averaged weights, in the precision of the training."""
    was_training = pl_module.training
    pl_module.eval()
    try:
        with averaged_weights(trainer, pl_module), trainer.precision_plugin.forward_context():
            pipeline = stage_pipeline(pl_module, settings)
            return pipeline(list(prompts), seed=list(seeds), batch_size=settings.batch_size)
    finally:
        pl_module.train(was_training)
