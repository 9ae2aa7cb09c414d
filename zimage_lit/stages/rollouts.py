"""Roll-outs: how stages draw the samples that rewards judge, and ask the rewards."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zimage_lit.components import LatentCodec
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.objectives import transitions
from zimage_lit.objectives.transitions import TRANSITIONS, Transition
from zimage_lit.rewards import RewardSet
from zimage_lit.rewards.pictures import quantised
from zimage_lit.sampling.solvers import Velocity, full_precision


@dataclass
class Rollout:
    """What became of some samples, each list float32 and of the samples' form."""

    states: list[list[Tensor]]  # before each step of the window, and after its last one
    made: list[Transition[list[Tensor]]]  # the Gaussian that each of these steps drew from
    clean: list[Tensor]


@torch.no_grad()
def roll_out(
    velocity: Velocity[list[Tensor]],
    noise: list[Tensor],
    grid: Tensor,
    window: range,
    kernel: str,
    level: float,
    fresh_noise: Callable[[int], list[Tensor]],
) -> Rollout:
    """Draw samples from `noise` along the noise levels `grid`, with noise in the steps of `window` alone.

    velocity: of latents at a time, as solvers take it.   kernel, level: of these steps, see `transitions`; the others
    are Euler's.   fresh_noise: standard normal of the latents' form for a step of the window.
    """
    latents = full_precision(noise)
    states, made = [latents], []
    for step, (sigma, sigma_next) in enumerate(pairwise(grid.tolist())):
        noisy = step in window
        v = velocity(latents, 1 - sigma)
        transition = TRANSITIONS[kernel if noisy else "ode"](latents, v, sigma, sigma_next, level)
        if noisy:
            latents = transitions.draw(transition, fresh_noise(step))
            made.append(transition)
            states.append(latents)
        else:
            latents = transition.mean
            if step < window.start:
                states = [latents]
    return Rollout(states, made, latents)


def repeated(batch: dict[str, Any], times: int) -> dict[str, Any]:
    """A batch in which every sample stands `times` times, one after the other."""
    return {name: [item for item in values for _ in range(times)] for name, values in batch.items()}


def decoded(codec: LatentCodec, latents: Sequence[Tensor]) -> list[Tensor]:
    """Latents (C, h, w) of any sizes -> pictures (3, H, W) float in [-1, 1], with their gradient."""
    return [codec.decode(one[None])[0] for one in latents]


@torch.no_grad()
def scored(
    rewards: RewardSet, codec: LatentCodec, latents: Sequence[Tensor], batch: dict[str, Any], group_size: int, step: int
) -> tuple[dict[str, Tensor], Tensor]:
    """What every reward says of samples, and the number of each one's group, (B,) int64.

    batch: `captions`, and perhaps `metadata`, of each sample; `group_size` of them, one after the other, are a group.
    step: as the record names it: the trainer's `global_step` when the iteration is over.
    """
    groups = torch.arange(len(latents), device=latents[0].device) // group_size
    pictures = [quantised(picture) for picture in decoded(codec, latents)]
    return rewards.score(pictures, batch["captions"], batch.get("metadata"), groups, step), groups


def latent_shapes(
    batch: dict[str, Any], canvases: Sequence[tuple[int, int]] | None, downsample: int, channels: int
) -> list[tuple[int, ...]]:
    """(C, H, W) of the latents to draw: those of the batch's pictures, else of the canvases, (width, height) in pixels,
    which samples take in turn. UserError where there are neither."""
    if "image_latents" in batch:
        return [tuple(x.shape) for x in batch["image_latents"]]
    if "images" in batch:
        sizes = [(image.shape[2], image.shape[1]) for image in batch["images"]]
    elif canvases:
        sizes = [canvases[place % len(canvases)] for place in range(len(batch["captions"]))]
    else:
        raise UserError("the data give prompts without pictures: say in model.init_args.canvases how large to draw.")
    return [(channels, height // downsample, width // downsample) for width, height in sizes]


def check_canvases(canvases: Iterable[Sequence[int]] | None) -> None:
    """UserError for sides that are no numbers of pixels."""
    for side in [side for size in canvases or [] for side in size]:
        at_least_one("model.init_args.canvases: each width and height", side)
