"""How callbacks draw pictures with the model in training: settings, and one function."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule, Trainer
from PIL import Image

from zimage_lit.callbacks.ema import averaged_weights
from zimage_lit.errors import UserError
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
    solver: str = "euler"  # euler, heun, cps or renoise
    eta: float = 0.0  # share of the noise that cps draws anew at each step
    batch_size: int = 64  # pictures drawn at once

    def __post_init__(self) -> None:
        check_schedule(self.num_inference_steps, self.shift)
        check_solver(self.solver, self.eta)
        check_guidance(self.guidance_scale, cfg_start=self.cfg_start)


def checked_sizes(
    key: str, canvases: Sequence[Sequence[int]] | None, settings: SamplingSettings
) -> list[tuple[int, int]]:
    """The (width, height) in pixels that the setting `key` names; None: that of `settings`. UserError for others."""
    if canvases is None:
        return [(settings.width, settings.height)]
    sizes = [tuple(size) for size in canvases]
    if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise UserError(f"{key} is {canvases}: give a list of [width, height] in pixels, or null.")
    return sizes  # type: ignore[return-value]


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
    sizes: Sequence[tuple[int, int]] | None = None,
    draws: Sequence[int] | None = None,
) -> list[Image.Image]:
    """One picture per prompt with the averaged weights, in the precision of the training.

    sizes: (width, height) of each picture in pixels; None: those of `settings`.   draws: which of its seed's noises
    each begins from; None: the first. Call it on every process of a run: where each holds a part of the weights, none
    can draw alone.
    """
    was_training = pl_module.training
    pl_module.eval()
    try:
        with averaged_weights(trainer, pl_module), trainer.precision_plugin.forward_context():
            pipeline = stage_pipeline(pl_module, settings)
            sizes = sizes or [(settings.width, settings.height)] * len(prompts)
            draws = draws or [0] * len(prompts)
            drawn: dict[int, Image.Image] = {}
            for width, height in dict.fromkeys(sizes):
                places = [place for place, size in enumerate(sizes) if size == (width, height)]
                pictures = pipeline(
                    [prompts[place] for place in places],
                    height=height,
                    width=width,
                    seed=[seeds[place] for place in places],
                    draw=[draws[place] for place in places],
                    batch_size=settings.batch_size,
                )
                drawn.update(zip(places, pictures, strict=True))
            return [drawn[place] for place in range(len(prompts))]
    finally:
        pl_module.train(was_training)
