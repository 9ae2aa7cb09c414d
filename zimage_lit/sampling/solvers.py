"""Solvers of dx/dt = v(x, t) from noise (t = 0) to a clean sample (t = 1), as plain functions of a velocity callable.

``velocity(latents, t)`` gets the current latents in the form they came in — one tensor or a list of (C, H, W) — and one
Python float t in [0, 1) that holds for all samples; it returns velocities of the same form.
``sigmas`` are the noise levels of ``schedules.sigmas``; t = 1 − sigma. The state is float32 (float64 if it came so),
whatever precision the network runs in.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

Latents = TypeVar("Latents", Tensor, list[Tensor])
Velocity = Callable[[Latents, float], Latents]
OnStep = Callable[[int, Latents], None]  # (index of the step just made, latents after it)


def euler(
    velocity: Velocity[Latents],
    latents: Latents,
    sigmas: Tensor | Sequence[float],
    on_step: OnStep[Latents] | None = None,
) -> Latents:
    """First order, one evaluation a step: x ← x + (sigma − sigma_next)·v. What the published weights are run with."""
    latents = full_precision(latents)
    for i, (sigma, sigma_next) in enumerate(pairwise(_floats(sigmas))):
        latents = _advance(latents, velocity(latents, 1 - sigma), sigma - sigma_next)
        if on_step is not None:
            on_step(i, latents)
    return latents


def heun(
    velocity: Velocity[Latents],
    latents: Latents,
    sigmas: Tensor | Sequence[float],
    on_step: OnStep[Latents] | None = None,
) -> Latents:
    """Second order, two evaluations a step: Euler's step, corrected by the mean of the velocities at its two ends.

    The last step stays Euler's. Its error is of the same order as the others' sum, and the network is never asked at
    sigma = 0, where training puts next to no samples. Source: Karras et al., arXiv 2206.00364, Algorithm 1.
    """
    latents = full_precision(latents)
    for i, (sigma, sigma_next) in enumerate(pairwise(_floats(sigmas))):
        step = sigma - sigma_next
        slope = velocity(latents, 1 - sigma)
        predicted = _advance(latents, slope, step)
        if sigma_next > 0:
            half_way = _advance(latents, slope, step / 2)
            predicted = _advance(half_way, velocity(predicted, 1 - sigma_next), step / 2)
        latents = predicted
        if on_step is not None:
            on_step(i, latents)
    return latents


def cps(
    velocity: Velocity[Latents],
    latents: Latents,
    sigmas: Tensor | Sequence[float],
    on_step: OnStep[Latents] | None = None,
    *,
    eta: float,
    fresh_noise: Callable[[int], Latents],
) -> Latents:
    """Euler's step, but of the noise that is left the share sin(eta·π/2) is drawn anew, so that early errors heal.

    x ← (1 − sigma_next)·x̂1 + sigma_next·(cos(eta·π/2)·x̂0 + sin(eta·π/2)·fresh), with x̂1 and x̂0 the clean sample and the
    noise that v points to. ``fresh_noise(i)``: standard normal of the latents' form for step i. eta = 0 is Euler's
    method, eta in [0, 1]. Unlike a stochastic differential equation it does not keep the distribution as it is: samples
    contract a little. Source: Coefficients-Preserving Sampling, arXiv 2509.05952.
    """
    latents = full_precision(latents)
    kept, drawn = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
    for i, (sigma, sigma_next) in enumerate(pairwise(_floats(sigmas))):
        slope = velocity(latents, 1 - sigma)
        clean, noise = _advance(latents, slope, sigma), _advance(latents, slope, sigma - 1)
        noise = _mixed(noise, kept, fresh_noise(i), drawn)
        latents = _mixed(clean, 1 - sigma_next, noise, sigma_next)
        if on_step is not None:
            on_step(i, latents)
    return latents


def renoise(
    velocity: Velocity[Latents],
    latents: Latents,
    sigmas: Tensor | Sequence[float],
    on_step: OnStep[Latents] | None = None,
    *,
    fresh_noise: Callable[[int], Latents],
) -> Latents:
    """The clean sample, noised again with nothing but fresh noise: x ← (1 − sigma_next)·x̂1 + sigma_next·fresh.

    It is cps with eta = 1; for students that were distilled with it. Sources: DMD2 (arXiv 2405.14867); consistency
    models (arXiv 2303.01469, Algorithm 1).
    """
    return cps(velocity, latents, sigmas, on_step, eta=1.0, fresh_noise=fresh_noise)


SOLVERS: dict[str, Callable[..., Any]] = {"euler": euler, "heun": heun, "cps": cps, "renoise": renoise}


def _advance(latents: Latents, velocity: Latents, step: float) -> Latents:
    if isinstance(latents, Tensor):
        return latents + step * velocity.to(latents.dtype)
    return [x + step * v.to(x.dtype) for x, v in zip(latents, velocity, strict=True)]


def _mixed(first: Latents, weight: float, second: Latents, other_weight: float) -> Latents:
    if isinstance(first, Tensor):
        return weight * first + other_weight * second.to(first.dtype)
    return [weight * x + other_weight * y.to(x.dtype) for x, y in zip(first, second, strict=True)]


def full_precision(latents: Latents) -> Latents:
    """The same latents in float32, or in float64 if they came so."""
    if isinstance(latents, Tensor):
        return latents.to(torch.promote_types(latents.dtype, torch.float32))
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in latents]


def _floats(sigmas: Tensor | Sequence[float]) -> list[float]:
    # Python floats once, instead of a device round trip at every step.
    return sigmas.tolist() if isinstance(sigmas, Tensor) else list(sigmas)
