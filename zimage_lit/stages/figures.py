"""What a stage's curves show of an iteration, the same on every rank."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def of_all_ranks(trainer: Any, values: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> mean of the values of all ranks together, or their standard deviation for a name that ends in `_std`.

    values: name -> (N,), N as it comes, 0 as well; a name without a value on any rank is left out. Every rank must
    call this, with the same names in the same order.
    """
    rows = [torch.stack([torch.ones_like(x), x, x.square()]).sum(1) for x in (v.double() for v in values.values())]
    device = trainer.strategy.root_device
    own = torch.stack([row.to(device) for row in rows])  # (names, 3): number, sum, sum of squares
    sums = trainer.strategy.all_gather(own).reshape(-1, *own.shape).sum(0).tolist()
    found = {}
    for name, (number, total, squares) in zip(values, sums, strict=True):
        if number:
            found[name] = mean = total / number
            if name.endswith("_std"):
                variance = squares / number - mean**2
                found[name] = 0.0 if variance < 0 else variance**0.5  # rounding may leave less than nothing
    return found
