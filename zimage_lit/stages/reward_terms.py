"""How rewards join distillation, which keeps the student from drawing only what pleases them (DMDR).

backprop    a differentiable reward of the decoded sample, added to the loss
grpo        a policy gradient on the stochastic steps of whole roll-outs; distribution matching stands where a penalty
            for leaving a reference would
advantage   the guidance term of each sample, times how much better it is than others of its prompt

Sources: DMDR (arXiv 2511.13649) for the first, its authors' answers (github.com/vvvvvjdy/dmdr/issues/4) for the others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from zimage_lit.components import LatentCodec
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.objectives import transitions
from zimage_lit.objectives.policy import clipped_policy_loss
from zimage_lit.rewards import RewardSet
from zimage_lit.rewards.pictures import quantised
from zimage_lit.stages.rollouts import decoded, scored

FORMS = ("backprop", "grpo", "advantage")


@dataclass
class RewardSettings:
    """What becomes of the rewards among the trainer's callbacks. The first of many settings to find is the weight: the
    reward's gradient should be a tenth to a half of that of distribution matching."""

    form: Literal["backprop", "grpo", "advantage"] = "backprop"  # see `reward_terms.py`
    weight: float = 1.0  # of the reward's loss; 0 = rewards are only logged. advantage: of all guidance, above 0
    start_step: int = 0  # of the student; before it there is distillation alone
    group_size: int = 4  # grpo, advantage: pictures of a prompt that are compared with each other
    std: Literal["group", "global"] = "group"  # grpo, advantage: by whose spread a reward is divided
    clip: float = 5.0  # grpo, advantage: largest advantage
    policy_steps: int = 1  # grpo: stochastic steps of a roll-out, drawn anew each time, that are learnt from
    eta: float = 0.8  # grpo with rollout.sampler=euler: share of the noise that its roll-outs draw anew, 1 = all

    def __post_init__(self) -> None:
        key = "model.init_args.reward"
        if self.form not in FORMS:
            raise UserError(f"{key}.form must be one of {', '.join(FORMS)}, not {self.form}.")
        if not 0 <= self.weight < math.inf:
            raise UserError(f"{key}.weight must be 0 or more, not {self.weight}.")
        if self.form == "advantage" and self.weight == 0:
            raise UserError(f"{key}.weight=0 with form=advantage would take all guidance away: set it above 0.")
        if self.start_step < 0:
            raise UserError(f"{key}.start_step must be 0 or more, not {self.start_step}.")
        if self.form != "backprop" and self.group_size < 2:
            raise UserError(f"{key}.group_size must be at least 2 to compare pictures, not {self.group_size}.")
        if self.std not in ("group", "global"):
            raise UserError(f"{key}.std must be group or global, not {self.std}.")
        if not self.clip > 0:
            raise UserError(f"{key}.clip must be more than 0, not {self.clip}.")
        at_least_one(f"{key}.policy_steps", self.policy_steps)
        transitions.check_transition("cps", self.eta)


def check_reward(reward: RewardSettings, objective: Any, num_inference_steps: int) -> None:
    """UserError where a form of reward does not find what it needs in the other settings."""
    key = "model.init_args"
    if reward.form == "advantage" and (objective.name != "decoupled" or objective.guidance_scale == 1):
        raise UserError(
            f"{key}.reward.form=advantage multiplies the guidance term: set {key}.objective.name=decoupled and a "
            "guidance_scale above 1."
        )
    if reward.form == "grpo" and reward.policy_steps >= num_inference_steps:
        raise UserError(
            f"{key}.reward.policy_steps must be less than rollout.num_inference_steps={num_inference_steps}, whose "
            f"last step draws no noise, not {reward.policy_steps}."
        )


class RewardTerm:
    """The rewards of a run, asked about a stage's samples.

    groups: consecutive samples of a batch, `group_size` each. `figures` holds what the last question gave to log.
    step, as the record names it: the trainer's `global_step` when the iteration is over.
    """

    def __init__(self, settings: RewardSettings, rewards: RewardSet, codec: LatentCodec) -> None:
        self.settings, self.rewards, self.codec = settings, rewards, codec
        self.figures: dict[str, float] = {}

    def value(self, latents: list[Tensor], batch: dict[str, Any], step: int, log_all: bool) -> Tensor:
        """Weighted sum of the differentiable rewards, (B,) with a gradient; `log_all`: the others are asked, too."""
        pictures = decoded(self.codec, latents)
        metadata = batch.get("metadata")
        scores = self.rewards.differentiable_scores(pictures, batch["captions"], metadata, step)
        self.figures = self.rewards.logged(scores)
        others = [reward.name for reward in self.rewards.rewards if reward.name not in scores]
        if log_all and others:
            shown = [quantised(picture) for picture in pictures]
            groups = range(len(shown))  # nobody is compared with anybody
            asked = self.rewards.score(shown, batch["captions"], metadata, groups, step, names=others)
            self.figures |= self.rewards.logged(asked)
        return self.rewards.weighted_sum(scores)

    @torch.no_grad()
    def advantages(self, latents: list[Tensor], batch: dict[str, Any], step: int) -> Tensor:
        """How much better each sample is than the others of its group, (B,), all rewards together."""
        scores, groups = scored(self.rewards, self.codec, latents, batch, self.settings.group_size, step)
        self.figures = self.rewards.logged(scores)
        return self.rewards.combined_advantages(scores, groups, self.settings.std, self.settings.clip)


def policy_losses(
    states: Sequence[list[Tensor]],
    velocities: dict[int, list[Tensor]],
    grid: Tensor,
    eta: float,
    advantages: Tensor,
) -> Tensor:
    """Policy-gradient loss (B,) of a roll-out, mean over the steps in `velocities`.

    states: latents before each step and after the last one; velocities: step -> the student's, with a graph.
    grid: noise levels; eta: share of the noise that a step drew anew. The density is a sample's mean over its elements.
    A roll-out is learnt from once, by the student that drew it, so all ratios are 1 and nothing is ever clipped.
    """
    losses = []
    for step, velocity in velocities.items():
        made = transitions.cps(states[step], velocity, grid[step], grid[step + 1], eta)
        density = transitions.log_prob(states[step + 1], made.mean, made.std)
        loss, _, _ = clipped_policy_loss(density, density.detach(), advantages, clip_range=1.0)
        losses.append(loss)
    return torch.stack(losses).mean(0)
