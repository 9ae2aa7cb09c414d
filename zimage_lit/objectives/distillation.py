"""Distilling a guided many-step teacher into a few-step student, as pure functions of tensors.

The student's clean sample x is noised again, and both the teacher and the fake score (which has learned the student's
own distribution) say what clean sample they see in it. Their difference is the gradient of the KL divergence from the
student's distribution to the teacher's, so x descends along

    DM = (x̂_fake − x̂_teacher) / normaliser                     distribution matching
    CA = −(w − 1)·(x̂_conditional − x̂_unconditional) / normaliser  guidance, as a term of its own

Coupled DMD (DMD2) is DM alone, with the guided clean sample of the teacher; Decoupled DMD is the sum of both terms, the
teacher of DM unguided, each term with times and noise of its own. At one time, one noise and one normaliser they are
the same, because u + w·(c − u) = c + (w − 1)·(c − u).

Sources: DMD2 (arXiv 2405.14867); Decoupled DMD (arXiv 2511.22677), Eq. 7 for mean and variance; SenseFlow (arXiv
2506.00523) for IDA.

Latents x are one tensor (B, …) or a list of B tensors (C, H, W) of any sizes. Results a sample are (B,) float32.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage_lit.objectives import flow_matching
from zimage_lit.objectives.latents import Latents, check_pairs, combine, means


@torch.no_grad()
def dm_direction(x: Latents, teacher_clean: Latents, fake_clean: Latents, clamp: float = 0.1) -> Latents:
    """Distribution matching: (x̂_fake − x̂_teacher) / normaliser, in the form of x, float32, without a graph.

    x: the student's clean sample; ``teacher_clean`` and ``fake_clean``: the clean samples that the two see in x noised
    again, at one time and with one noise. With the guided ``teacher_clean`` it is the whole of coupled DMD.
    Raises ValueError where batches or shapes differ, or clamp is not positive.
    """
    check_pairs(teacher_clean, fake_clean)
    scale = normaliser(x, teacher_clean, clamp)
    return combine(lambda r, f, n: (f.float() - r.float()) / n, teacher_clean, fake_clean, numbers=[scale])


@torch.no_grad()
def ca_direction(
    x: Latents,
    conditional_clean: Latents,
    unconditional_clean: Latents,
    guidance_scale: float,
    clamp: float = 0.1,
) -> Latents:
    """Guidance as a term of its own: −(w − 1)·(x̂_c − x̂_u) / normaliser, in the form of x, float32, without a graph.

    ``conditional_clean`` and ``unconditional_clean``: what the teacher sees in x noised again, with the caption and
    with the empty one. ``guidance_scale`` is the standard w; 1 gives zero.
    Raises ValueError where batches or shapes differ, or clamp is not positive.
    """
    check_pairs(conditional_clean, unconditional_clean)
    scale = (guidance_scale - 1) / normaliser(x, conditional_clean, clamp)
    return combine(lambda c, u, n: (u.float() - c.float()) * n, conditional_clean, unconditional_clean, numbers=[scale])


@torch.no_grad()
def normaliser(x: Latents, clean: Latents, clamp: float) -> Tensor:
    """max(mean |x − clean|, clamp) over each sample's own elements, (B,) float32: what makes a direction's size alike
    at all noise levels. Without the clamp it vanishes, and the direction explodes, where the teacher agrees with x."""
    if not clamp > 0:
        raise ValueError(f"clamp must be positive, not {clamp}.")
    return _distances(x, clean).clamp(min=clamp)


def pseudo_loss(x: Latents, direction: Latents) -> Tensor:
    """A loss (B,) whose gradient is the direction: d loss_i / d x_i = direction_i / (elements of x_i).

    ½·MSE(x, x − direction) with a fixed target. Its value, ½·mean(direction²), says nothing about convergence.
    """
    check_pairs(x, direction)
    target = combine(lambda sample, step: sample.detach().float() - step.detach(), x, direction)
    return 0.5 * flow_matching.loss(x, target)


def fake_score_loss(predicted: Latents, noise: Latents, student_sample: Latents) -> Tensor:
    """Flow-matching loss (B,) of the fake score on the student's samples, which get no gradient from it.

    ``predicted``: its velocity at the sample mixed with ``noise``, without guidance. That mixture, too, must be made of
    a detached sample.
    """
    detached = combine(lambda sample: sample.detach(), student_sample)
    return flow_matching.loss(predicted, flow_matching.target_velocity(noise, detached))


def mean_variance_loss(x: Latents, data_mean: float | Tensor, data_std: float | Tensor) -> Tensor:
    """KL divergence (B,) from the Gaussian of each sample's mean and variance to that of the data.

    ½·[(σ² + (μ − μ_data)²)/σ_data² − 1 − ln(σ²/σ_data²)]: a weak substitute for distribution matching, which keeps
    guidance from raising the contrast without end. ``data_mean`` and ``data_std``: numbers, of all elements of the
    latents, or (C,) each, channel by channel, where the result is the mean over the channels.
    Raises ValueError for a data_std that is not positive.
    """
    first = x[0]
    mean = torch.as_tensor(data_mean, dtype=torch.float32, device=first.device).reshape(-1, 1)
    variance = torch.as_tensor(data_std, dtype=torch.float32, device=first.device).reshape(-1, 1).square()
    if not bool((variance > 0).all()):
        raise ValueError(f"data_std must be positive, not {data_std}.")
    return torch.stack([_gaussian_divergence(sample.float(), mean, variance) for sample in x])


def _gaussian_divergence(sample: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    flat = sample.reshape(len(mean), -1)  # one row, or one a channel
    own_variance, own_mean = torch.var_mean(flat, dim=1, keepdim=True, correction=0)
    ratio = (own_variance / variance).clamp(min=1e-8)  # an even sample has none
    return 0.5 * (ratio + (own_mean - mean).square() / variance - 1 - ratio.log()).mean()


@torch.no_grad()
def blend(target_parameters: Iterable[Tensor], source_parameters: Iterable[Tensor], decay: float) -> None:
    """target ← decay·target + (1 − decay)·source, in place; decay 1 changes nothing.

    IDA: after each of its updates the fake score takes a little of the student's weights, which keeps it near the
    student's distribution. Of sharded weights give the local parts. Targets in half precision would lose a decay
    near 1: a thousandth of a step is less than their last digit.
    Raises ValueError where the two differ in number, or decay lies outside [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in [0, 1], not {decay}.")
    for target, source in zip(target_parameters, source_parameters, strict=True):
        target.lerp_(source.to(target.dtype), 1 - decay)


@torch.no_grad()
def gap(x: Latents, teacher_clean: Latents, fake_clean: Latents) -> Tensor:
    """mean |x̂_teacher − x̂_fake| / mean |x − x̂_teacher| of each sample, (B,): what is left to learn, while losses
    stay as they are. It is small where the fake score and the teacher agree."""
    smallest = torch.finfo(torch.float32).tiny
    return _distances(teacher_clean, fake_clean) / _distances(x, teacher_clean).clamp(min=smallest)


@torch.no_grad()
def cosine(first: Latents, second: Latents) -> Tensor:
    """Cosine of the angle between two directions of each sample, as one vector over the whole latent, (B,)."""
    check_pairs(first, second)
    pairs = zip(first, second, strict=True)
    return torch.stack([F.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0) for a, b in pairs])


def _distances(first: Latents, second: Latents) -> Tensor:
    check_pairs(first, second)
    return means(combine(lambda a, b: (a.float() - b.float()).abs(), first, second))
