"""What alignment.py compares its arms with: rewards and preferences that have nothing to do with the pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zimage_lit.rewards.contract import Metadata
from zimage_lit.rewards.pictures import picture_hash
from zimage_lit.rewards.tinyworld import TinyWorldReward
from zimage_lit.rng import generator
from zimage_lit.stages import DPOModule


class ShuffledReward(TinyWorldReward):
    """TinyWorld's scores, dealt out anew among the pictures of a call: as many of each, to others."""

    def score(self, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]) -> Tensor:
        scores = super().score(images, prompts, metadata)
        order = int(picture_hash(images[0])[:8], 16)  # of the pictures alone, so a run that goes on deals alike
        return scores[torch.randperm(len(scores), generator=generator(order, "shuffled", 0))]


class RandomLabels(DPOModule):
    """Which picture of a pair is called the winner is decided by a coin, once for each pair."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        batch = dict(batch)
        for winner, loser in (("winners", "losers"), ("winner_latents", "loser_latents")):
            if winner in batch:
                pairs = zip(batch["ids"], batch[winner], batch[loser], strict=True)
                dealt = [(b, a) if self.coin(number) else (a, b) for number, a, b in pairs]
                batch[winner], batch[loser] = ([pair[side] for pair in dealt] for side in (0, 1))
        return super().training_step(batch, batch_idx)

    def coin(self, number: int | str) -> bool:
        return bool(torch.randint(2, (), generator=generator(self.seed, f"label/{number}", 0)))
