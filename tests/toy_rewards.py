"""Rewards as users write them, good and bad."""

import math
import time

import torch
from toys import ToyModule

from zimage_lit.rewards import PairwiseReward, RewardCallback, RewardSet


class Warmth(RewardCallback):
    def score(self, images, prompts, metadata):
        return torch.stack([(image[0].float() - image[2].float()).mean() / 255 for image in images])


class Red(RewardCallback):
    """The red channel's mean, with a note of each call."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.calls = []

    def score(self, images, prompts, metadata):
        self.calls.append(list(prompts))
        return torch.stack([image[0].float().mean() for image in images])


class RankInGroup(Red):
    """Groupwise: how many of the group are darker."""

    kind = "groupwise"

    def score(self, images, prompts, metadata):
        reds = super().score(images, prompts, metadata)
        return (reds[:, None] > reds[None, :]).sum(1).float()


class Redder(PairwiseReward):
    def compare(self, first, second, prompts, metadata):
        pairs = zip(first, second, strict=True)
        return torch.tensor([float(one[0].float().mean() > other[0].float().mean()) for one, other in pairs])


class Raising(RewardCallback):
    def score(self, images, prompts, metadata):
        raise RuntimeError("the scorer fell over")


class NotANumber(Red):
    """NaN for pictures without any red."""

    def score(self, images, prompts, metadata):
        reds = super().score(images, prompts, metadata)
        return torch.where(reds > 0, reds, math.nan)


class Slow(Red):
    """Takes as long as the metadata say."""

    def score(self, images, prompts, metadata):
        time.sleep(max(known.get("seconds", 0) for known in metadata))
        return super().score(images, prompts, metadata)


class WrongShape(RewardCallback):
    def score(self, images, prompts, metadata):
        return torch.zeros(len(images), 1)


class NoTensor(RewardCallback):
    def score(self, images, prompts, metadata):
        return [0.0 for _ in images]


class Root(RewardCallback):
    """Differentiable: the square root of the mean, NaN (with a NaN derivative) below 0."""

    differentiable = True

    def score(self, images, prompts, metadata):
        return torch.stack([image.mean().sqrt() for image in images])


class RewardedModule(ToyModule):
    """A stage as rewards see it: two pictures a step, one group, judged and logged."""

    def on_train_start(self):
        self.rewards = RewardSet.of_run(self.trainer)
        self.rewards.forget_after(self.global_step)

    def training_step(self, batch, batch_idx):
        images = [torch.full((3, 4, 4), 10 * self.global_step + i, dtype=torch.uint8) for i in (0, 5)]
        scores = self.rewards.score(images, ["a", "a"], group_ids=torch.zeros(2).long(), step=self.global_step + 1)
        self.log_dict(self.rewards.logged(scores))
        assert self.rewards.combined_advantages(scores, torch.zeros(2).long()).sum() == 0
        return super().training_step(batch, batch_idx)
