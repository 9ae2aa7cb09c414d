"""Rewards whose best pictures are known: to see whether training follows a reward at all, and how hacking looks."""

import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zimage_lit.errors import UserError
from zimage_lit.rewards.contract import Metadata, RewardCallback
from zimage_lit.rewards.pictures import as_pil


class JPEGSize(RewardCallback):
    """−(bytes of the picture as a JPEG file) / 1000: plain pictures score best; a weight below 0 wants rich ones.

    quality: of the file, 1 to 95. Source: DDPO (arXiv 2305.13301), section 5.1, which has 95.
    """

    device = "cpu"

    def __init__(self, quality: int = 95, **settings: Any) -> None:
        super().__init__(**settings)
        if not 1 <= quality <= 95:
            raise UserError(f"the reward {self.name}: quality must lie in [1, 95], not {quality}.")
        self.quality = quality

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return torch.tensor([-self.size(image) / 1000 for image in images])

    def size(self, image: Tensor) -> int:
        """Bytes."""
        buffer = io.BytesIO()
        as_pil(image).save(buffer, "JPEG", quality=self.quality)
        return buffer.tell()


class Brightness(RewardCallback):
    """The mean of all channels, 0 for black and 1 for white. Differentiable."""

    differentiable = True

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        return torch.stack([(image.mean() + 1) / 2 for image in images])
