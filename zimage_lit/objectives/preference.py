"""Learning from pairs of pictures of which one is preferred (Diffusion-DPO), as pure functions of tensors.

A flow-matching error stands where a language model's DPO has a log-probability. With e = |v(x_t) − (x1 − x0)|², the
winner w and the loser l of a pair at the same time t (and with the same noise x0, or each with the noise that it was
drawn from), and a frozen reference:

    Δ = (e_w − e_w,ref) − (e_l − e_l,ref),   L = −log σ(−(β/2)·Δ)

Sources: Diffusion-DPO (arXiv 2311.12908); for flow matching Flow-DPO (arXiv 2501.13918), with a β constant over t.
"""

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from zimage_lit.objectives import flow_matching
from zimage_lit.objectives.latents import Latents

Reduction = Literal["mean", "sum"]
Band = tuple[float, float]  # lowest and highest value that is admitted


def denoising_errors(predicted: Latents, target: Latents, reduction: Reduction) -> Tensor:
    """Squared error of each sample's velocity, (B,) float32: the mean over its D elements, or D times that.

    The same loss needs a β of the sum that is the mean's divided by D, so β says nothing without the reduction; and
    with the sum a large picture is pulled harder than a small one.
    ``predicted``, ``target``: (B, …) or lists of (C, H, W). Raises ValueError where they do not go together, or for an
    unknown reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', not {reduction!r}.")
    means = flow_matching.loss(predicted, target)
    if reduction == "mean":
        return means
    return means * torch.tensor([x.numel() for x in target], dtype=means.dtype, device=means.device)


def preference_logit(
    policy_winner: Tensor, policy_loser: Tensor, reference_winner: Tensor, reference_loser: Tensor, beta: float
) -> Tensor:
    """−(β/2)·Δ of each pair, (B,): above 0 where the policy tells the pair apart rightly, compared with the reference.

    The arguments are errors (B,) float32. The gradient flows to the policy's alone. Raises ValueError for shapes that
    differ, or a β that is not positive.
    """
    errors = policy_winner, policy_loser, reference_winner, reference_loser
    if len({error.shape for error in errors}) != 1 or policy_winner.ndim != 1:
        raise ValueError(f"The four errors must be (B,) each, not {', '.join(str(tuple(e.shape)) for e in errors)}.")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive, not {beta}.")
    change = (policy_winner - reference_winner.detach()) - (policy_loser - reference_loser.detach())
    return -beta / 2 * change


def dpo_loss(
    policy_winner: Tensor, policy_loser: Tensor, reference_winner: Tensor, reference_loser: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """−log σ(−(β/2)·Δ) of each pair, and whether it is told apart rightly: (loss (B,), implicit accuracy (B,)).

    The accuracy is 1 for Δ < 0, 0 for Δ > 0, and a half for a tie, so a policy that is still its reference has a loss
    of ln 2 and an accuracy of .5 exactly. It is no evidence of better pictures: with a small β it nears 1 while both
    errors grow. Arguments and errors as in ``preference_logit``.
    """
    logit = preference_logit(policy_winner, policy_loser, reference_winner, reference_loser, beta)
    return -logsigmoid(logit), (logit.detach().sign() + 1) / 2


@torch.no_grad()
def relative_change(policy: Tensor, reference: Tensor) -> Tensor:
    """e / e_ref − 1 of each sample, (B,): by how much the policy is worse than the reference; negative is better."""
    return policy / reference - 1


def band_at(start: Band, end: Band, share: float) -> Band:
    """The band of a curriculum on its straight way from ``start`` (share 0) to ``end`` (share 1 and beyond)."""
    share = min(max(share, 0.0), 1.0)
    return (1 - share) * start[0] + share * end[0], (1 - share) * start[1] + share * end[1]


def admitted_pairs(difficulties: Tensor, margins: Tensor, difficulty_band: Band, margin_band: Band) -> Tensor:
    """Which pairs lie in both bands, ends included: (B,) bool. Where none does, it is the one that is nearest to them
    (its distances to the two added; the first of several): every rank has something to learn from.

    ``difficulties``, ``margins``: (B,), B at least 1.
    """
    away = _distance(difficulties, difficulty_band) + _distance(margins, margin_band)
    admitted = away == 0
    if not admitted.any():
        admitted[away.argmin()] = True
    return admitted


def _distance(values: Tensor, band: Band) -> Tensor:
    return (band[0] - values).clamp(min=0) + (values - band[1]).clamp(min=0)
