"""All rewards of a run as one: scores by name, advantages, a weighted sum to be differentiated."""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from zimage_lit.errors import UserError
from zimage_lit.objectives.policy import group_advantages
from zimage_lit.rewards.contract import Metadata, RewardCallback, check_names, find_rewards
from zimage_lit.rewards.judging import Judge, checked, float32_by_default, take, told
from zimage_lit.rewards.pictures import quantised
from zimage_lit.rewards.record import RewardRecord

Scores = dict[str, Tensor]  # reward's name -> (B,) float32, NaN where it has no judgement


class RewardSet:
    """Rewards that judge the same pictures.

    rewards: as `find_rewards` gives them.   record: where every judgement is written; None: nowhere.
    Each process judges its own pictures, and a group lies on one process: statistics of a group are never gathered.
    Raises UserError where two rewards have one name.
    """

    def __init__(self, rewards: Sequence[RewardCallback], record: RewardRecord | None = None) -> None:
        check_names(rewards)
        self.rewards = list(rewards)
        self.record = record
        self.judges = {reward.name: Judge(reward) for reward in self.rewards}

    @classmethod
    def of_run(cls, trainer: Any) -> Self:
        """The rewards among a trainer's callbacks, recorded in `rewards/rank-….jsonl` of the run's folder."""
        path = Path(trainer.default_root_dir) / "rewards" / f"rank-{trainer.global_rank}.jsonl"
        return cls(find_rewards(trainer), RewardRecord(path))

    @property
    def weighing(self) -> list[RewardCallback]:
        """Those that training follows."""
        return [reward for reward in self.rewards if not reward.held_out]

    @float32_by_default()
    def score(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
        group_ids: Tensor | Sequence[int] | None = None,
        step: int = 0,
        names: Collection[str] | None = None,
    ) -> Scores:
        """Every reward's scores, held-out ones among them: name -> (B,) float32 on the pictures' device.

        images: uint8 (3, H, W) RGB.   metadata: of each prompt; None: nothing is known.
        group_ids: (B,) equal for the pictures of one group; two groups may have the same prompt. Needed by groupwise
        and pairwise rewards, which get each group whole.   step: as the record names it.   names: of the rewards that
        are asked; None: all.
        Raises UserError for a reward that fails (see RewardCallback), ValueError for lists of different lengths.
        """
        metadata = [{}] * len(prompts) if metadata is None else metadata
        ids = group_ids.tolist() if isinstance(group_ids, Tensor) else group_ids
        if not len(images) == len(prompts) == len(metadata) == (len(images) if ids is None else len(ids)):
            raise ValueError("RewardSet.score needs one prompt, metadata and group id for each picture.")
        scores, applies = {}, {}
        for reward in self.rewards:
            if names is not None and reward.name not in names:
                continue
            applies[reward.name] = [
                place for place in range(len(prompts)) if reward.applies_to(prompts[place], metadata[place])
            ]
            scores[reward.name] = self.judge(reward, applies[reward.name], images, prompts, metadata, ids)
        self.write(step, images, prompts, ids, scores, applies)
        return {name: values.to(images[0].device) if images else values for name, values in scores.items()}

    def judge(
        self,
        reward: RewardCallback,
        places: list[int],
        images: Sequence[Tensor],
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        ids: Sequence[int] | None,
    ) -> Tensor:
        """One reward's scores (B,) on the CPU; only the pictures at `places` are shown to it."""
        scores = torch.full((len(images),), math.nan, dtype=torch.float32)
        if places:
            reward.prepare(images[0].device)
            shown = [images[place].detach().to(reward.device) for place in places]
            if reward.differentiable:
                shown = [image.float() / 127.5 - 1 for image in shown]
            groups = None if ids is None else groups_of(take(ids, places))
            scores[places] = self.judges[reward.name](shown, take(prompts, places), take(metadata, places), groups)
        return scores

    def combined_advantages(
        self,
        scores: Mapping[str, Tensor],
        group_ids: Tensor,
        std: Literal["group", "global"] = "group",
        clip: float = 5.0,
    ) -> Tensor:
        """Weighted sum over the rewards of their advantages inside each group, (B,); held-out ones do not weigh.

        A picture that a reward could not judge has none of its advantage, like one of the group's mean. For `std` and
        `clip`, which holds for each reward by itself, see `objectives.policy.group_advantages`.
        Raises UserError where no reward weighs.
        """
        self.check_any(self.weighing, "is not held out")
        total = torch.zeros(len(group_ids), dtype=torch.float32, device=group_ids.device)
        for reward in self.weighing:
            advantages, _ = group_advantages(scores[reward.name].to(group_ids.device), group_ids, std, clip)
            total = total + reward.weight * advantages
        return total

    def differentiable(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
        step: int = 0,
    ) -> Tensor:
        """Weighted sum of the differentiable rewards that are not held out, (B,) with the gradient of `images`."""
        return self.weighted_sum(self.differentiable_scores(images, prompts, metadata, step))

    @float32_by_default()
    def differentiable_scores(
        self,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        metadata: Sequence[Metadata] | None = None,
        step: int = 0,
    ) -> Scores:
        """Name -> (B,) with gradient, of the differentiable rewards that are not held out, NaN where none is given.

        images: float (3, H, W) in [-1, 1], as a codec decodes them. A picture that a reward could not judge gets no
        gradient from it, not even NaN. All are shown in one call, whatever batch_size says, and there is no time limit:
        a graph is not left half made.
        Raises UserError for a reward that fails (`required: false` does not help here), for one that is not pointwise,
        and where there is none.
        """
        metadata = [{}] * len(prompts) if metadata is None else metadata
        rewards = [reward for reward in self.weighing if reward.differentiable]
        self.check_any(rewards, "is differentiable and not held out")
        scores, applies = {}, {}
        for reward in rewards:
            if reward.kind != "pointwise":
                raise UserError(
                    f"the reward {reward.name} is differentiable and {reward.kind}, but no groups are formed where "
                    "rewards are differentiated: make it pointwise, or set held_out to true."
                )
            places = [place for place in range(len(prompts)) if reward.applies_to(prompts[place], metadata[place])]
            values = torch.full((len(images),), math.nan, dtype=torch.float32, device=images[0].device)
            if places:
                reward.prepare(images[0].device)
                judged = differentiate(reward, take(images, places), take(prompts, places), take(metadata, places))
                values[places] = judged
                self.judges[reward.name].count(int(judged.isnan().sum()), len(judged))
            scores[reward.name], applies[reward.name] = values, places
        if self.record is not None:
            self.write(step, [quantised(image) for image in images], prompts, None, scores, applies)
        return scores

    def weighted_sum(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Sum of weight times score over the given rewards, (B,), nothing from those that could not judge."""
        weights = {reward.name: reward.weight for reward in self.rewards}
        return sum(  # type: ignore[return-value]
            weights[name] * torch.where(values.isnan(), 0.0, values) for name, values in scores.items()
        )

    def logged(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """What a stage logs: `reward/<name>`, the mean of what was judged, its standard deviation `…_std`, and the
        share of the last pictures that it applied to and could not judge, `…_invalid`."""
        found: dict[str, float] = {}
        for name, values in scores.items():
            judged = values.detach()[~values.isnan()]
            if len(judged):
                found[f"reward/{name}"] = judged.mean().item()
                found[f"reward/{name}_std"] = judged.std(correction=0).item()
            failed, pictures = self.judges[name].failures()
            found[f"reward/{name}_invalid"] = failed / max(pictures, 1)
        return found

    def logged_values(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `logged` is made of, (N,) each, for a stage that takes means over ranks; all names, whatever was
        judged."""
        found: dict[str, Tensor] = {}
        for name, values in scores.items():
            judged = values.detach()[~values.isnan()]
            failed, pictures = self.judges[name].failures()
            found |= {f"reward/{name}": judged, f"reward/{name}_std": judged}
            found[f"reward/{name}_invalid"] = torch.arange(pictures) < failed
        return found

    def forget_after(self, step: int) -> None:
        """Drop what was recorded after `step`: for a stage that goes on from a checkpoint of that step."""
        if self.record is not None:
            self.record.forget_after(step)

    def check_any(self, rewards: Sequence[RewardCallback], needed: str) -> None:
        if not rewards:
            there = ", ".join(reward.name for reward in self.rewards) or "none at all"
            raise UserError(f"no reward among trainer.callbacks {needed} (there are: {there}): add one that is.")

    def write(
        self,
        step: int,
        images: Sequence[Tensor],
        prompts: Sequence[str],
        ids: Sequence[int] | None,
        scores: Scores,
        applies: Mapping[str, list[int]],
    ) -> None:
        if self.record is None:
            return
        given: list[dict[str, Any]] = [{} for _ in images]
        versions = {reward.name: reward.version for reward in self.rewards}
        for name, places in applies.items():
            values = scores[name].tolist()
            for place in places:
                score = None if math.isnan(values[place]) else values[place]
                given[place][name] = {"score": score, "version": versions[name]}
        self.record.write(step, images, prompts, ids or [None] * len(images), given)


def groups_of(ids: Sequence[int]) -> list[list[int]]:
    """The places of each group, groups in the order of their first picture."""
    groups: dict[int, list[int]] = {}
    for place, group in enumerate(ids):
        groups.setdefault(group, []).append(place)
    return list(groups.values())


def differentiate(
    reward: RewardCallback, images: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[Metadata]
) -> Tensor:
    """A differentiable reward's scores (B,) on the pictures' device; no gradient reaches a picture it did not judge."""
    judged = torch.ones(len(images), dtype=torch.bool)

    def guarded(place: int) -> Tensor:
        image = images[place].to(reward.device).float()
        if image.requires_grad:
            image = image.view_as(image)
            # 0 times the NaN derivative of what could not be judged would be NaN
            image.register_hook(lambda gradient: gradient if judged[place] else torch.zeros_like(gradient))
        return image

    shown = [guarded(place) for place in range(len(images))]
    try:
        with torch.autocast(shown[0].device.type, enabled=False):
            result = reward.score(shown, prompts, metadata)
    except Exception as error:
        raise UserError(f"the reward {reward.name} failed ({told(error)}): mend it.") from error
    values = checked(reward.name, result, len(images))
    judged[:] = values.detach().isfinite().cpu()
    return values.to(images[0].device)
