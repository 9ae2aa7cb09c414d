"""Losses of pairs against closed forms, and the bands of a curriculum."""

import math

import pytest
import torch

from zimage_lit.objectives.preference import (
    admitted_pairs,
    band_at,
    denoising_errors,
    dpo_loss,
    preference_logit,
    relative_change,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(seed: int = 0) -> list[torch.Tensor]:
    """Of policy and reference on winners and losers, six pairs."""
    return list(random(4, 6, seed=seed).square())


# --------------------------------------------------------------------------------------------------- errors


def test_errors_are_those_of_a_loop_over_samples_of_any_sizes():
    predicted = [random(2, 3, 4), random(2, 5, 4), random(2, 3, 4, seed=1)]
    target = [random(*x.shape, seed=9 + i) for i, x in enumerate(predicted)]
    sums = torch.stack([((a - b) ** 2).sum() for a, b in zip(predicted, target, strict=True)])
    elements = torch.tensor([24, 40, 24])
    torch.testing.assert_close(denoising_errors(predicted, target, "sum"), sums)
    torch.testing.assert_close(denoising_errors(predicted, target, "mean"), sums / elements)
    half = [x.bfloat16() for x in predicted]
    assert denoising_errors(half, target, "sum").dtype == torch.float32


def test_errors_of_tensors_are_those_of_lists():
    predicted, target = random(3, 2, 4, 4), random(3, 2, 4, 4, seed=1)
    for reduction in ("mean", "sum"):
        of_list = denoising_errors(list(predicted), list(target), reduction)
        assert torch.equal(denoising_errors(predicted, target, reduction), of_list)


def test_a_sum_with_its_beta_divided_by_the_elements_is_the_mean():
    predicted, target = random(4, 2, 4, 4), random(4, 2, 4, 4, seed=1)
    losses = []
    for reduction, beta in (("mean", 50.0), ("sum", 50.0 / 32)):
        policy = denoising_errors(predicted, target, reduction).chunk(2)
        reference = denoising_errors(0.9 * predicted, target, reduction).chunk(2)
        losses.append(dpo_loss(*policy, *reference, beta)[0])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert losses[0].std() > 0.1  # else any beta would do


# --------------------------------------------------------------------------------------------------- the loss


def test_a_policy_that_is_its_reference_loses_ln_2_and_is_right_half_of_the_time():
    winner, loser, *_ = errors()
    loss, accuracy = dpo_loss(winner, loser, winner.clone(), loser.clone(), 2000.0)
    assert torch.equal(loss, torch.full((6,), math.log(2))) and torch.equal(accuracy, torch.full((6,), 0.5))


def test_the_loss_is_the_formula_of_the_paper():
    policy_w, policy_l, reference_w, reference_l = errors()
    loss, accuracy = dpo_loss(policy_w, policy_l, reference_w, reference_l, 3.0)
    for i in range(6):
        delta = (policy_w[i] - reference_w[i]) - (policy_l[i] - reference_l[i])
        assert float(loss[i]) == pytest.approx(-math.log(1 / (1 + math.exp(1.5 * delta))), rel=1e-5)
        assert float(accuracy[i]) == (delta < 0)
    assert 0 < accuracy.mean() < 1


def test_the_loss_is_finite_however_far_apart_a_pair_is():
    far, near = torch.tensor([1e4]), torch.tensor([0.0])
    for winner, loser, expected in ((far, near, 1e7), (near, far, 0.0)):
        loss, _ = dpo_loss(winner, loser, near, near, 2000.0)
        assert float(loss) == pytest.approx(expected)


def test_swapping_the_pair_turns_the_gradient_round_at_the_reference_and_the_accuracy_everywhere():
    winner, loser, reference_w, reference_l = (x.requires_grad_() for x in errors())
    (loss, accuracy), (swapped, other) = (
        dpo_loss(winner, loser, reference_w, reference_l, 3.0),
        dpo_loss(loser, winner, reference_l, reference_w, 3.0),
    )
    assert torch.equal(accuracy, 1 - other)
    logit = preference_logit(winner, loser, reference_w, reference_l, 3.0)
    torch.testing.assert_close(swapped - loss, logit)  # -log σ(-z) + log σ(z) = z
    at_reference = [
        torch.autograd.grad(dpo_loss(a, b, a.detach(), b.detach(), 3.0)[0].sum(), winner)[0]
        for a, b in ((winner, loser), (loser, winner))
    ]
    assert torch.equal(at_reference[0], -at_reference[1]) and (at_reference[0] == 0.75).all()  # β/2 · σ(0)


def test_the_gradient_flows_to_the_policy_alone():
    policy_w, policy_l, reference_w, reference_l = (x.requires_grad_() for x in errors())
    dpo_loss(policy_w, policy_l, reference_w, reference_l, 3.0)[0].sum().backward()
    assert reference_w.grad is None and reference_l.grad is None
    assert torch.equal(policy_w.grad, -policy_l.grad) and (policy_w.grad > 0).all()


def test_the_gradient_of_a_linear_model_is_the_one_on_paper():
    """v = a·x_t with one number a: dL/da = σ(βΔ/2)·(β/2)·(2·mean[(a·x_w − u_w)·x_w] − the same of the loser)."""
    a, reference, beta = torch.tensor(0.7, requires_grad=True), 0.4, 5.0
    x_w, x_l, u_w, u_l = (random(1, 8, seed=seed) for seed in range(4))

    def error(weight, x, u):
        return denoising_errors(weight * x, u, "mean")

    policy, frozen = (error(a, x_w, u_w), error(a, x_l, u_l)), (error(reference, x_w, u_w), error(reference, x_l, u_l))
    dpo_loss(*policy, *frozen, beta)[0].sum().backward()
    delta = float((policy[0] - frozen[0]) - (policy[1] - frozen[1]))
    slopes = [float(2 * ((0.7 * x - u) * x).mean()) for x, u in ((x_w, u_w), (x_l, u_l))]
    expected = 1 / (1 + math.exp(-beta / 2 * delta)) * beta / 2 * (slopes[0] - slopes[1])
    assert float(a.grad) == pytest.approx(expected, rel=1e-5)


def test_relative_change_is_none_at_the_reference_and_negative_where_it_is_better():
    assert relative_change(torch.tensor([2.0, 1.0, 3.0]), torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.0, -0.5, 0.5]


def test_arguments_that_do_not_go_together_are_refused():
    a = torch.ones(3)
    with pytest.raises(ValueError, match=r"\(B,\) each, not \(3,\), \(2,\)"):
        dpo_loss(a, a[:2], a, a, 1.0)
    with pytest.raises(ValueError, match="beta must be positive"):
        dpo_loss(a, a, a, a, 0.0)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', not 'max'"):
        denoising_errors(a[:, None], a[:, None], "max")  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- the curriculum


def test_bands_move_on_straight_lines_and_then_stay():
    bands = [band_at((0.2, 0.6), (0.0, 1.0), share) for share in (0, 0.25, 0.5, 1, 7)]
    assert bands[0] == (0.2, 0.6) and bands[3] == bands[4] == (0.0, 1.0)
    assert bands[1] == pytest.approx((0.15, 0.7)) and bands[2] == pytest.approx((0.1, 0.8))


def test_admitted_are_the_pairs_inside_both_bands_ends_included():
    difficulties = torch.tensor([0.0, 0.3, 0.3, 0.5, 0.51], dtype=torch.float64)
    margins = torch.tensor([0.2, 0.6, 0.61, 0.4, 0.4], dtype=torch.float64)
    assert admitted_pairs(difficulties, margins, (0.0, 0.5), (0.2, 0.6)).tolist() == [True, True, False, True, False]


def test_where_no_pair_is_inside_the_nearest_one_is_taken():
    difficulties, margins = torch.tensor([0.9, 0.6, 0.5, 0.7]), torch.tensor([0.3, 0.3, 0.9, 0.3])
    assert admitted_pairs(difficulties, margins, (0.0, 0.5), (0.2, 0.6)).tolist() == [False, True, False, False]
    same = torch.full((3,), 0.8)
    assert admitted_pairs(same, same, (0.0, 0.5), (0.2, 0.6)).tolist() == [True, False, False]  # one, not all
