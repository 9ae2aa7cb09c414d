"""RMS norm, with what follows it in the block folded in: a factor per sample, or the rotation of queries and keys.

On a GPU torch's fused kernel does the norm. On a CPU torch composes it of a dozen passes over memory and keeps most of
their results for the backward; the autograd function here takes half the passes and keeps only its input.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_lit.backbone.rope import rotate, rotate_


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the mean square is taken in float32, as in the reference."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, factor: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
        """x (…, dim), times `factor` (broadcast) if given, then turned by `rotation` (T, dim / 2) if given."""
        weight = self.weight if factor is None else self.weight * factor
        if x.device.type == "cpu":
            return _ScaledRMSNorm.apply(x, weight, self.eps, rotation)
        normalised = fused_rms_norm(x, self.eps) * weight.to(x.dtype)
        return normalised if rotation is None else rotate(normalised, rotation)


def fused_rms_norm(x: Tensor, eps: float) -> Tensor:
    """torch's own, of the dtype of x also under autocast, which by itself would make float32 of all that follows.

    The variable-length attention takes no float32: with that the whole network would run at half its speed or less.
    """
    if not torch.amp.is_autocast_available(x.device.type):  # the meta device
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], eps=eps)


class _ScaledRMSNorm(torch.autograd.Function):
    """The same by hand, in float32 and rounded once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, rotation: Tensor | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # a product would be cast by autocast
        inverse_rms = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms, rotation)
        scaled = (wide * inverse_rms).mul_(weight)
        return (scaled if rotation is None else rotate_(scaled, rotation)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse_rms, rotation = ctx.saved_tensors
        wide = x.to(inverse_rms.dtype)
        gradient = gradient.to(wide.dtype, copy=True, memory_format=torch.contiguous_format)
        if rotation is not None:
            rotate_(gradient, rotation.conj())
        product = gradient * wide
        if weight.ndim == 1:  # sums along rows and columns as products with vectors: one reading each
            weight_gradient = inverse_rms.flatten() @ product.flatten(0, -2)
            along = (product @ weight.to(product.dtype)).unsqueeze(-1)
        else:
            weight_gradient = (product * inverse_rms).sum_to_size(weight.shape)
            along = (product * weight).sum(dim=-1, keepdim=True)
        pull = along.mul_(inverse_rms.square()).div_(-x.shape[-1])
        x_gradient = gradient.mul_(weight).addcmul_(wide, pull).mul_(inverse_rms)
        return x_gradient.to(x.dtype), weight_gradient.to(weight.dtype), None, None
