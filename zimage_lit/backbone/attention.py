"""Attention over packed samples: one variable-length kernel on a GPU, dense groups of like length elsewhere."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage_lit.backbone.packing import Groups, Segments

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch built without it: the dense groups below serve every device
    varlen_attn = None  # type: ignore[assignment]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Full bidirectional attention inside each sample, never across; (T, heads, head_dim) -> the same shape."""
    if varlen_attn is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        boundaries, longest = segments.cumulative, segments.longest
        return cast(Tensor, varlen_attn(query, key, value, boundaries, boundaries, longest, longest))
    return attention_in_groups(query, key, value, segments.groups)


def attention_in_groups(query: Tensor, key: Tensor, value: Tensor, groups: Groups) -> Tensor:
    """Samples of like length share one dense call, in which a mask hides what the shorter ones lack."""
    if len(groups.sizes) == 1 and not len(groups.pads):
        return attention_of_group((query, key, value), groups.sizes[0], groups.masks[0])
    sizes = [samples * length for samples, length in groups.sizes]
    padded = (_Rows.apply(x, groups.source, groups.place, None).split(sizes) for x in (query, key, value))
    outputs = [
        attention_of_group(parts, size, mask)
        for *parts, size, mask in zip(*padded, groups.sizes, groups.masks, strict=True)
    ]
    return cast(Tensor, _Rows.apply(torch.cat(outputs), groups.place, groups.source, groups.pads))


def attention_of_group(parts: Sequence[Tensor], size: tuple[int, int], mask: Tensor | None) -> Tensor:
    """Query, key and value (n * length, heads, head_dim) of n samples -> the same shape."""
    query, key, value = (part.unflatten(0, size).transpose(1, 2) for part in parts)
    return dense_attention(query, key, value, mask).transpose(1, 2).flatten(0, 1)


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """(n, heads, length, head_dim) -> the same; torch's fused kernel but where plain products measure faster.

    mask: (n, 1, 1, length), added to the scores; None for nothing.
    """
    if mask is not None:
        mask = mask.to(query.dtype)
    if query.device.type == "cpu" and query.dtype is torch.bfloat16 and query.shape[-2] <= 512:
        # torch's fused CPU kernel runs its bfloat16 backward 2 to 5 times slower than these lines, as long as the
        # scores fit into the processor's cache; autocast would make float32 of the weights and bfloat16 of them again
        with torch.autocast("cpu", enabled=False):
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
            weights = (scores if mask is None else scores.add_(mask)).softmax(dim=-1)
            return weights @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class _Rows(torch.autograd.Function):
    """Rows taken by number. Its gradient is a lookup, too: torch's own would add rows, several times slower."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, back: Tensor, unused: Tensor | None) -> Tensor:
        """numbers: of the rows. back: of each row of x, where it went. unused: rows of x that went nowhere."""
        ctx.save_for_backward(back, unused)
        return x.index_select(0, numbers)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, unused = ctx.saved_tensors
        rows = gradient.index_select(0, back)
        return rows if unused is None else rows.index_fill_(0, unused, 0), None, None, None
