"""3-D rotary position embedding over (caption index, row, column)."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def rotation_tables(
    axes_dims: tuple[int, ...], axes_lens: tuple[int, ...], theta: float, device: torch.device
) -> list[Tensor]:
    """Per axis, the unit complex numbers (length, d/2) complex64 whose angles are position * theta^(-2i/d).

    Angles are formed in float64 and rounded once, as in the reference code.
    """
    tables = []
    for dim, length in zip(axes_dims, axes_lens, strict=True):
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).float()
        tables.append(torch.polar(torch.ones_like(angles), angles).to(device))
    return tables


def rotations(positions: Tensor, tables: list[Tensor]) -> Tensor:
    """(T, 3) integer positions -> (T, head_dim / 2) complex64."""
    return torch.cat([table[positions[:, axis]] for axis, table in enumerate(tables)], dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i+1) of x (T, heads, head_dim) by rotation (T, head_dim / 2), in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)


def rotate_(x: Tensor, rotation: Tensor) -> Tensor:
    """`rotate` in place, for a contiguous float32 x."""
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rotation[:, None])
    return x
