"""Policy gradients on groups of samples of one prompt, as pure functions of tensors.

Sources: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818). Log-probabilities come from
``transitions.log_prob``, whose reduction decides what a clip range means.
"""

from typing import Literal

import torch
from torch import Tensor


@torch.no_grad()
def group_advantages(
    rewards: Tensor, group_ids: Tensor, std: Literal["group", "global"] = "group", clip: float = 5.0
) -> tuple[Tensor, Tensor]:
    """How much better a sample is than the others of its group: (advantages (B,) float32, valid (B,) bool).

    (reward − mean of its group) / (std + 1e-4), clipped to ±``clip``. ``std``: of each group, or one of all rewards in
    the batch, which does not blow up small differences. ``rewards``: (B,), NaN where a sample could not be judged: that
    one is left out of all means, gets 0, and is not valid. ``group_ids``: (B,) integers, in any order. A group whose
    rewards are all equal says nothing, and gets 0.
    Raises ValueError for shapes that differ, ids that are no integers, infinite rewards, or an unknown std.
    """
    _check_groups(rewards, group_ids)
    if std not in ("group", "global"):
        raise ValueError(f"std must be 'group' or 'global', not {std!r}.")
    valid = ~rewards.isnan()
    values = torch.where(valid, rewards, 0).double()
    _, group = group_ids.unique(return_inverse=True)
    scope = group if std == "group" else torch.zeros_like(group)
    variance = _means_within(scope, (values - _means_within(scope, values, valid)).square(), valid)
    offset = values - _means_within(group, values, valid)
    useful = valid & ~uninformative(rewards, group_ids)
    advantages = torch.where(useful, offset / (variance.sqrt() + 1e-4), 0).clamp(-clip, clip)
    return advantages.float(), valid


@torch.no_grad()
def uninformative(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Whether all judged samples of a sample's group have the same reward, or none was judged: (B,) bool.

    The mean of it is the share of samples that teach nothing; it rises where prompts are too easy or too hard.
    """
    _check_groups(rewards, group_ids)
    groups, place = group_ids.unique(return_inverse=True)
    ends = [
        torch.full((len(groups),), start, dtype=rewards.dtype, device=rewards.device).scatter_reduce(
            0, place, rewards.nan_to_num(nan=start), reduction
        )
        for start, reduction in ((-torch.inf, "amax"), (torch.inf, "amin"))
    ]
    return (ends[0] <= ends[1])[place]


def clipped_policy_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped loss of each sample: (loss, ratio, clipped), (B,) each.

    ratio = exp(log_prob − old_log_prob); loss = max(−A·ratio, −A·clip(ratio, 1 − c, 1 + c)). ``clipped`` says where the
    clip stops the gradient: the ratio has already gone beyond the range in the direction that the advantage A wants.
    ``old_log_prob``: of the policy that drew the samples; at the first update it equals ``log_prob`` exactly, if both
    were computed alike. The gradient flows to ``log_prob`` alone.
    Raises ValueError for shapes that differ, or a clip range that is not positive.
    """
    if not clip_range > 0:
        raise ValueError(f"clip_range must be positive, not {clip_range}.")
    if not log_prob.shape == old_log_prob.shape == advantages.shape:
        shapes = tuple(log_prob.shape), tuple(old_log_prob.shape), tuple(advantages.shape)
        raise ValueError(
            "log_prob, old_log_prob and advantages must have one shape, not {}, {} and {}.".format(*shapes)
        )
    advantages = advantages.detach()
    ratio = torch.exp(log_prob - old_log_prob.detach())
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(free, held), ratio, (held > free).detach()


def _means_within(group: Tensor, values: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid samples of each sample's group (numbered from 0), (B,); NaN where there are none."""
    zeros = torch.zeros_like(values)
    counts = zeros.index_add(0, group, valid.to(values.dtype))
    return (zeros.index_add(0, group, values * valid) / counts)[group]


def _check_groups(rewards: Tensor, group_ids: Tensor) -> None:
    if rewards.ndim != 1 or rewards.shape != group_ids.shape:
        raise ValueError(
            f"rewards and group_ids must be (B,) both, not {tuple(rewards.shape)} and {tuple(group_ids.shape)}."
        )
    if group_ids.is_floating_point() or group_ids.is_complex():
        raise ValueError(f"group_ids must be integers, not {group_ids.dtype}: rounded ones would merge groups.")
    if bool(rewards.isinf().any()):
        raise ValueError("A reward is infinite; a sample that cannot be judged has the reward NaN.")
