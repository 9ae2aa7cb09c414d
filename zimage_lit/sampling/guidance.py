"""Classifier-free guidance in the standard convention: v = u + w·(c − u), w = 1 means none.

Z-Image's own code and diffusers' ZImagePipeline write v = c + g·(c − u) instead: their g is w − 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from zimage_lit.errors import UserError
from zimage_lit.sampling.solvers import Latents

Backbone = Callable[[list[Tensor], Tensor, list[Tensor]], list[Tensor]]


def from_published_scale(g: float) -> float:
    """The house's w for a scale g of the published Z-Image code (g = 0 is none there)."""
    return g + 1.0


def guided(
    conditional: Latents, unconditional: Latents, guidance_scale: float, cfg_normalization: float = 0.0
) -> Latents:
    """u + w·(c − u), one tensor (B, …) or a list of (C, H, W), float32.

    ``cfg_normalization`` c > 0 keeps a sample's result, as one vector over the whole latent, from growing longer than
    c times its conditional velocity; 0 switches that off. Source: Z-Image pipeline.
    """
    if isinstance(conditional, Tensor):
        return torch.stack(guided(list(conditional), list(unconditional), guidance_scale, cfg_normalization))
    pairs = zip(conditional, unconditional, strict=True)
    return [_guided_one(c, u, guidance_scale, cfg_normalization) for c, u in pairs]


def _guided_one(conditional: Tensor, unconditional: Tensor, guidance_scale: float, cfg_normalization: float) -> Tensor:
    conditional, unconditional = conditional.float(), unconditional.float()
    velocity = unconditional + guidance_scale * (conditional - unconditional)
    if cfg_normalization <= 0:
        return velocity
    longest = cfg_normalization * torch.linalg.vector_norm(conditional)
    length = torch.linalg.vector_norm(velocity)
    return torch.where(length > longest, velocity * (longest / length), velocity)


def guided_velocity(
    backbone: Backbone,
    captions: Sequence[Tensor],
    negative_captions: Sequence[Tensor] | None,
    guidance_scale: float,
    cfg_truncation: float = 1.0,
    cfg_normalization: float = 0.0,
    cfg_start: float = 0.0,
) -> Callable[[Any, float], Any]:
    """A velocity callable for the solvers; both branches travel in one packed forward of 2·B samples.

    ``captions`` and ``negative_captions``: B features (L_i, D) each. Guidance acts where cfg_start <= t <=
    cfg_truncation; elsewhere, and where guidance_scale is 1, the unconditional branch is not evaluated at all, so such
    a step costs half. At high noise guidance makes pictures of one prompt alike and adds objects; source of leaving it
    out there: Kynkäänniemi et al., "Applying Guidance in a Limited Interval", arXiv 2404.07724.
    Raises ValueError where guidance is asked for without as many negative captions as captions, and UserError for
    numbers that make no sense.
    """
    check_guidance(guidance_scale, cfg_truncation, cfg_normalization, cfg_start)
    positives = list(captions)
    guides = guidance_scale != 1.0
    if guides and (negative_captions is None or len(negative_captions) != len(positives)):
        given = "none" if negative_captions is None else len(negative_captions)
        raise ValueError(
            f"guidance_scale={guidance_scale} needs one negative for each of {len(positives)} captions, got {given}."
        )
    negatives = list(negative_captions) if guides and negative_captions is not None else []

    def velocity(latents: Latents, t: float) -> Latents:
        samples = list(latents)
        if not guides or not cfg_start <= t <= cfg_truncation:
            return _like(latents, backbone(samples, _times(t, samples), positives))
        both = backbone(samples * 2, _times(t, samples * 2), positives + negatives)
        conditional, unconditional = both[: len(samples)], both[len(samples) :]
        return _like(latents, guided(conditional, unconditional, guidance_scale, cfg_normalization))

    return velocity


def check_guidance(
    guidance_scale: float, cfg_truncation: float = 1.0, cfg_normalization: float = 0.0, cfg_start: float = 0.0
) -> None:
    """Raise UserError for a scale that is not finite, a start or truncation that is no time, a length that is none."""
    if not math.isfinite(guidance_scale):
        raise UserError(f"guidance_scale must be a finite number (1 = none), not {guidance_scale}.")
    if not 0 <= cfg_truncation <= 1:
        raise UserError(f"cfg_truncation must lie in [0, 1] (1 = guidance at every step), not {cfg_truncation}.")
    if not 0 <= cfg_start <= 1:
        raise UserError(f"cfg_start must lie in [0, 1] (0 = guidance from the first step), not {cfg_start}.")
    if not 0 <= cfg_normalization < math.inf:
        raise UserError(f"cfg_normalization must be a finite number from 0 (unlimited) up, not {cfg_normalization}.")


def _times(t: float, samples: list[Tensor]) -> Tensor:
    return torch.full((len(samples),), t, dtype=torch.float32, device=samples[0].device)


def _like(latents: Latents, velocity: list[Tensor]) -> Latents:
    """Velocities in the form of the latents: one tensor where those are one."""
    if isinstance(latents, Tensor):
        return torch.stack(velocity)
    return velocity
