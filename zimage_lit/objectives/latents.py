"""Batches of latents in their two forms: one tensor (B, …), or a list of B tensors of any shapes, one a sample."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Latents = TypeVar("Latents", Tensor, list[Tensor])


def combine(
    function: Callable[..., Tensor], first: Latents, *others: Latents, numbers: Sequence[Tensor] = ()
) -> Latents:
    """``function`` of the samples of several batches, elementwise, in the form of the first.

    ``numbers``: (B,) each, one a sample; the function gets them after the latents, ready to be multiplied with those.
    """
    arguments: Any = (first, *others)
    if isinstance(first, Tensor):
        return function(*arguments, *(number.reshape(-1, *[1] * (first.ndim - 1)) for number in numbers))
    return [function(*sample) for sample in zip(*arguments, *numbers, strict=True)]


def means(latents: Latents) -> Tensor:
    """Mean over each sample's own elements, (B,)."""
    if isinstance(latents, Tensor):
        return latents.flatten(1).mean(dim=1)
    return torch.stack([x.mean() for x in latents])


def check_pairs(first: Latents, second: Latents) -> None:
    """Raise ValueError where the forms, the batches or the shapes of a sample differ."""
    if isinstance(first, Tensor) != isinstance(second, Tensor):
        raise ValueError("Latents must both be tensors (B, …) or both be lists of (C, H, W), not one of each.")
    if len(first) != len(second):
        raise ValueError(f"Two batches that belong together have {len(first)} and {len(second)} samples.")
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape:
        return  # without a look at every sample
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.shape != b.shape:
            raise ValueError(f"Sample {i} has shape {tuple(a.shape)} on one side and {tuple(b.shape)} on the other.")


def check_batch(latents: Latents, t: Tensor) -> None:
    """Raise ValueError where t is not one time a sample, (B,)."""
    if t.shape != (len(latents),):
        raise ValueError(f"t must have shape ({len(latents)},), one time a sample, but has {tuple(t.shape)}.")
