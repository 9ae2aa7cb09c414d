"""Attention over packed samples: one variable-length kernel on a GPU, dense runs of equal length elsewhere."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from zimage_lit.backbone.packing import Segments

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch built without it: the dense runs below serve every device
    varlen_attn = None  # type: ignore[assignment]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Full bidirectional attention inside each sample, never across; (T, heads, head_dim) -> the same shape."""
    if varlen_attn is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        boundaries, longest = segments.cumulative, segments.longest
        return cast(Tensor, varlen_attn(query, key, value, boundaries, boundaries, longest, longest))
    return attention_by_runs(query, key, value, segments)


def attention_by_runs(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Tensor:
    """Neighbours of equal length share one dense call; nothing is padded and no mask is needed."""
    sizes = [samples * length for samples, length in segments.runs]
    outputs = []
    for (samples, _), *parts in zip(
        segments.runs, query.split(sizes), key.split(sizes), value.split(sizes), strict=True
    ):
        dense = (part.unflatten(0, (samples, -1)).transpose(1, 2) for part in parts)
        outputs.append(dense_attention(*dense).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(n, heads, length, head_dim) -> the same; torch's fused kernel but where plain products measure faster."""
    if query.device.type == "cpu" and query.dtype is torch.bfloat16:
        # torch's fused CPU kernel runs its bfloat16 backward 2 to 5 times slower than these three lines
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        return weights.softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)
