"""Flow matching as pure functions of tensors: a straight path from noise x0 to data x1, learned by its velocity.

    x_t = t·x1 + (1 − t)·x0,   v = x1 − x0,   t in [0, 1], 0 = noise, 1 = clean

Source: Z-Image technical report, Eq. 1 (arXiv 2511.22699); Liu et al., Rectified Flow (arXiv 2209.03003).

Every function takes one tensor (B, …) or a list of B tensors of any shapes, one a sample, and returns the same form.
"""

import torch
from torch import Tensor

from zimage_lit.objectives.latents import Latents, check_batch, check_pairs


def interpolate(noise: Latents, data: Latents, t: Tensor) -> Latents:
    """The point x_t = t·x1 + (1 − t)·x0 on the path from ``noise`` (x0) to ``data`` (x1).

    ``noise`` and ``data``: float32, (B, …) or lists of (C, H, W); ``t``: (B,) in [0, 1].
    Raises ValueError where the batches or the shapes of a sample differ.
    """
    check_pairs(noise, data)
    check_batch(data, t)
    if isinstance(data, Tensor):
        t = t.reshape(-1, *[1] * (data.ndim - 1))
        return t * data + (1 - t) * noise
    return [t_i * x1 + (1 - t_i) * x0 for x0, x1, t_i in zip(noise, data, t.unbind(), strict=True)]


def target_velocity(noise: Latents, data: Latents) -> Latents:
    """v = x1 − x0, what the network learns; the same at every t, because the path is straight."""
    check_pairs(noise, data)
    if isinstance(data, Tensor):
        return data - noise
    return [x1 - x0 for x0, x1 in zip(noise, data, strict=True)]


def clean_from_velocity(latents: Latents, velocity: Latents, t: Tensor) -> Latents:
    """The clean sample that a velocity at x_t points to: x1 = x_t + (1 − t)·v.

    ``latents`` and ``velocity``: (B, …) or lists of (C, H, W); ``t``: (B,).
    """
    check_pairs(latents, velocity)
    check_batch(latents, t)
    if isinstance(latents, Tensor):
        return latents + (1 - t).reshape(-1, *[1] * (latents.ndim - 1)) * velocity
    return [x + (1 - t_i) * v for x, v, t_i in zip(latents, velocity, t.unbind(), strict=True)]


def loss(predicted: Latents, target: Latents) -> Tensor:
    """Mean squared error of each sample, (B,) float32.

    The mean runs over one sample's own elements, so a 1024² picture weighs as much as a 256² one; the batch is not
    reduced, so the caller can weigh, log by timestep, or take ``.mean()``.
    """
    check_pairs(predicted, target)
    if isinstance(target, Tensor):
        return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)
    if len({x.shape for x in target}) == 1:
        return loss(torch.stack(predicted), torch.stack(target))
    # One subtraction over all samples joined end to end, then one mean a segment: no kernels for each sample.
    joined_target = torch.cat([x.reshape(-1) for x in target]).float()
    joined_predicted = torch.cat([x.reshape(-1) for x in predicted]).float()
    lengths = torch.tensor([x.numel() for x in target], device=joined_target.device)
    return torch.segment_reduce((joined_predicted - joined_target).square(), "mean", lengths=lengths)
