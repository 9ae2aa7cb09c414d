"""Reinforcement learning on the forward process: samples are noised again, and no density of a sampler is needed.

Good samples pull the velocity towards themselves, and bad ones pull its mirror image: with the velocity v of the policy
and v_old of the one that drew the samples,

    v+ = v_old + b·(v − v_old)        the policy, taken a share b of its way
    v− = v_old − b·(v − v_old)        its mirror image
    x̂± = x_t + (1 − t)·v±             the clean samples they see
    loss = clip/b·[q·mean(x̂+ − x1)²/w+ + (1 − q)·mean(x̂− − x1)²/w−],   w± = mean|x̂± − x1|

q in [0, 1] says how good the sample is; ½ is the middle. Any sampler may draw, without guidance.
Source: DiffusionNFT (arXiv 2509.16117).
"""

import torch
from torch import Tensor

from zimage_lit.objectives.flow_matching import clean_from_velocity
from zimage_lit.objectives.latents import Latents, check_pairs, combine, means

SMALLEST_WEIGHT = 1e-5  # of w±, where the clean sample is met exactly


def optimality(advantages: Tensor, clip: float = 5.0) -> Tensor:
    """q = ½ + ½·A/clip, in [0, 1], (B,): ½ for a sample like the others of its group."""
    if not clip > 0:
        raise ValueError(f"clip must be positive, not {clip}.")
    return (advantages / clip).clamp(-1, 1) / 2 + 0.5


def forward_process_loss(
    velocity: Latents,
    old_velocity: Latents,
    noisy: Latents,
    clean: Latents,
    t: Tensor,
    advantages: Tensor,
    mixing: float = 1.0,
    clip: float = 5.0,
) -> Tensor:
    """DiffusionNFT's loss of each sample, (B,) float32; its gradient flows to ``velocity`` alone.

    ``noisy``: the samples ``clean`` (x1) mixed with noise at times ``t`` (B,); ``velocity`` and ``old_velocity`` are
    those there. ``mixing`` is b, in (0, 1]; ``clip`` that of the advantages, by which the loss is multiplied, as the
    weights of published penalties expect. Where velocity equals old_velocity the gradient is A times that of
    supervised learning, up to the positive factor 1/w of the sample.
    Raises ValueError for shapes that differ, and a mixing outside of (0, 1].
    """
    if not 0 < mixing <= 1:
        raise ValueError(f"mixing must lie in (0, 1], not {mixing}.")
    check_pairs(velocity, old_velocity)
    old = combine(lambda v: v.detach().float(), old_velocity)
    step = combine(lambda v, before: mixing * (v.float() - before), velocity, old)
    towards, away = combine(torch.add, old, step), combine(torch.sub, old, step)
    q = optimality(advantages.detach(), clip)
    positive, negative = (_weighed_error(v, noisy, clean, t) for v in (towards, away))
    return clip / mixing * (q * positive + (1 - q) * negative)


def lag(rollouts: int, flat: int = 0, rate: float = 0.001, largest: float = 0.5) -> float:
    """Share of itself that the policy which draws keeps after so many roll-outs: 0, so that it draws as what is
    trained, for ``flat`` of them, then ``rate`` more with each, up to ``largest``."""
    return min(max(rollouts - flat, 0) * rate, largest)


def _weighed_error(velocity: Latents, noisy: Latents, clean: Latents, t: Tensor) -> Tensor:
    """mean(x̂ − x1)² / mean|x̂ − x1|, the divisor without a gradient and in float64, (B,)."""
    error = combine(torch.sub, clean_from_velocity(noisy, velocity, t), clean)
    weight = means(combine(lambda e: e.detach().double().abs(), error)).clamp(min=SMALLEST_WEIGHT)
    return (means(combine(torch.square, error)) / weight).float()
