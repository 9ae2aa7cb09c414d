"""Policy gradients on groups of samples of one prompt, as pure functions of tensors.

Sources: Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818), GRPO-Guard (arXiv 2510.22319), Flow-DPPO (arXiv
2606.11025). A step of the sampler is a Gaussian of ``transitions``; the reduction over its elements decides what a
clip range means.
"""

from typing import Literal

import torch
from torch import Tensor

from zimage_lit.objectives.latents import Latents, check_pairs, combine, means
from zimage_lit.objectives.transitions import Reduction
from zimage_lit.sampling.solvers import full_precision


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


def log_ratio(
    x_next: Latents,
    mean: Latents,
    old_mean: Latents,
    std: Tensor,
    reduction: Reduction = "mean",
    ratio: Literal["plain", "guard"] = "plain",
) -> Tensor:
    """Logarithm of how much likelier a step has become, from N(old_mean, std²), which drew it, to N(mean, std²): (B,).

    plain: log_prob − old_log_prob = Σ(ε·Δ)/std − Σ(Δ²)/(2·std²), with Δ = mean − old_mean and ε = (x_next −
    old_mean)/std. It is worked out in this form: the difference of two densities near 1 has lost the digits that a clip
    range of 1e-5 is about. Its second term makes it negative on average, so that samples with a positive advantage are
    clipped too late. guard: Σ(ε·Δ), which is zero on average (GRPO-Guard's normalised ratio). Where nothing has
    changed, both are exactly 0.

    ``x_next``, ``mean``, ``old_mean``: one tensor (B, …) or lists; ``std``: (B,); Σ: mean or sum over a sample's
    elements, as in ``transitions.log_prob``. The gradient flows to ``mean`` alone. Raises ValueError for shapes that
    differ, a std of 0, an unknown reduction or ratio.
    """
    if ratio not in ("plain", "guard"):
        raise ValueError(f"ratio must be 'plain' or 'guard', not {ratio!r}.")
    check_pairs(x_next, old_mean)
    drift = _drift(mean, old_mean, std)
    drawn = combine(lambda x, old, s: (x - old.detach()) / s, full_precision(x_next), old_mean, numbers=[std])
    linear = _reduced(combine(torch.mul, drawn, drift), reduction)
    if ratio == "guard":
        return linear
    return linear / std - _reduced(combine(torch.square, drift), reduction) / (2 * std**2)


def divergence(mean: Latents, other_mean: Latents, std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """KL divergence between two Gaussians of one step, Σ(mean − other_mean)²/(2·std²), (B,) float32.

    "mean" divides it by the number of elements, as it does densities. The gradient flows to ``mean`` alone.
    """
    return _reduced(combine(torch.square, _drift(mean, other_mean, std)), reduction) / (2 * std**2)


def masked_policy_loss(
    log_ratio: Tensor, divergence: Tensor, advantages: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Flow-DPPO's loss of each sample: (loss, ratio, masked), (B,) each.

    loss = −A·ratio, without a clip. A sample stops teaching (``masked``) where the policy has moved by a ``divergence``
    of at least ``threshold`` and its advantage A would move it further. Raises ValueError for shapes that differ, or a
    threshold that is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, not {threshold}.")
    if not log_ratio.shape == divergence.shape == advantages.shape:
        shapes = tuple(log_ratio.shape), tuple(divergence.shape), tuple(advantages.shape)
        raise ValueError("log_ratio, divergence and advantages must have one shape, not {}, {} and {}.".format(*shapes))
    advantages, ratio = advantages.detach(), torch.exp(log_ratio)
    loss = -advantages * ratio
    masked = ((divergence >= threshold) & (advantages * log_ratio > 0)).detach()
    return torch.where(masked, loss.detach(), loss), ratio, masked


@torch.no_grad()
def group_spread(latents: list[Tensor], group_size: int) -> Tensor:
    """How different the samples of each group are, (groups,): the root of the mean squared difference of two of them.

    ``latents``: consecutive groups of one shape each; the mean runs over all pairs of a group and over the elements. It
    falls where a policy forgets all but one picture of a prompt.
    """
    groups = [torch.stack(latents[i : i + group_size]).float() for i in range(0, len(latents), group_size)]
    return torch.stack([(2 * group.var(dim=0).mean()).sqrt() for group in groups])


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


def _drift(mean: Latents, old_mean: Latents, std: Tensor) -> Latents:
    check_pairs(mean, old_mean)
    if not bool((std > 0).all()):
        raise ValueError("A transition without noise (std = 0) has no density; leave its step out of the policy loss.")
    return combine(lambda new, old: new - old.detach(), full_precision(mean), old_mean)


def _reduced(latents: Latents, reduction: Reduction) -> Tensor:
    """Mean or sum over each sample's own elements, (B,)."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}.")
    average = means(latents)
    return (
        average if reduction == "mean" else average * torch.tensor([x.numel() for x in latents], device=average.device)
    )


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
