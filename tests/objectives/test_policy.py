import math
import statistics

import pytest
import torch

from zimage_lit.objectives.policy import (
    clipped_policy_loss,
    divergence,
    group_advantages,
    group_spread,
    log_ratio,
    masked_policy_loss,
    uninformative,
)
from zimage_lit.objectives.transitions import cps, dance_sde, draw, flow_sde, log_prob

NAN = math.nan
REWARDS = torch.tensor([0.1, 0.9, 0.4, 2.0, NAN, 3.5, 0.2, 0.2, 5.0, NAN, 7.0, 6.0])
GROUPS = torch.tensor([3, 3, 3, 8, 8, 8, 1, 1, 0, 0, 9, 8])


def brute_force(rewards: list[float], groups: list[int], std: str) -> list[float]:
    everything = [reward for reward in rewards if not math.isnan(reward)]
    found = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(r)]
        if math.isnan(reward) or len(set(members)) < 2:
            found.append(0.0)
            continue
        spread = statistics.pstdev(members if std == "group" else everything)
        found.append((reward - statistics.fmean(members)) / (spread + 1e-4))
    return found


# --------------------------------------------------------------------------------------------- advantages


@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_are_those_of_a_loop_over_groups(std):
    advantages, valid = group_advantages(REWARDS, GROUPS, std)
    assert advantages.dtype == torch.float32 and advantages.shape == (12,)
    torch.testing.assert_close(advantages, torch.tensor(brute_force(REWARDS.tolist(), GROUPS.tolist(), std)))
    assert torch.equal(valid, ~REWARDS.isnan())


@pytest.mark.parametrize("std", ["group", "global"])
def test_the_order_of_the_batch_and_the_names_of_the_groups_mean_nothing(std):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    renamed = GROUPS[order] * 2**40 - 7
    advantages, valid = group_advantages(REWARDS[order], renamed, std)
    expected, expected_valid = group_advantages(REWARDS, GROUPS, std)
    torch.testing.assert_close(advantages, expected[order])
    assert torch.equal(valid, expected_valid[order])


def test_advantages_of_a_group_have_mean_zero_and_variance_one():
    rewards, groups = torch.randn(64, generator=torch.Generator().manual_seed(0)), torch.arange(4).repeat(16)
    advantages, _ = group_advantages(100 * rewards + 7, groups)
    for group in range(4):
        own = advantages[groups == group]
        assert abs(float(own.mean())) < 1e-6 and float(own.std(correction=0)) == pytest.approx(1, abs=1e-4)


def test_what_could_not_be_judged_changes_nothing_for_the_others():
    rewards, groups = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 0])
    with_gap, valid = group_advantages(torch.tensor([1.0, NAN, 2.0, 4.0]), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(with_gap[valid], group_advantages(rewards, groups)[0])
    assert with_gap[1] == 0 and valid.tolist() == [True, False, True, True]


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_group_of_equal_rewards_gives_exactly_zero(std):
    """The mean of three doubles 0.1 is off by a digit, which must not become an advantage."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 1.0], dtype=torch.float64)
    groups = torch.tensor([5, 5, 5, 6, 6])
    assert rewards[:3].sum() / 3 != 0.1
    advantages, valid = group_advantages(rewards, groups, std)
    assert not advantages[:3].any() and advantages[3:].all() and valid.all()
    assert uninformative(rewards, groups).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_group_that_nobody_could_judge_gives_zero_and_no_nan(std):
    rewards, groups = torch.tensor([NAN, NAN, NAN, 1.0]), torch.tensor([0, 0, 1, 1])
    for part in (slice(None), slice(0, 2)):
        advantages, valid = group_advantages(rewards[part], groups[part], std)
        assert not advantages.any() and torch.equal(valid, ~rewards[part].isnan())
        assert uninformative(rewards[part], groups[part]).all()


def test_advantages_are_clipped():
    rewards, groups = torch.cat([torch.zeros(99), torch.ones(1)]), torch.zeros(100, dtype=torch.int64)
    unclipped = (1 - 0.01) / (math.sqrt(0.01 * 0.99) + 1e-4)
    assert float(group_advantages(rewards, groups, clip=20.0)[0][-1]) == pytest.approx(unclipped)
    assert float(group_advantages(rewards, groups)[0][-1]) == 5.0
    assert float(group_advantages(-rewards, groups)[0][-1]) == -5.0


def test_groups_whose_numbers_differ_in_the_last_digit_stay_apart():
    rewards, groups = torch.tensor([1.0, 2.0, 10.0, 20.0]), 2**53 + torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(
        group_advantages(rewards, groups)[0], torch.tensor([-1.0, 1.0, -1.0, 1.0]), atol=3e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("rewards", "groups", "std", "message"),
    [
        (REWARDS, GROUPS[:3], "group", r"must be \(B,\) both, not \(12,\) and \(3,\)"),
        (REWARDS, GROUPS.float(), "group", "must be integers, not torch.float32"),
        (torch.tensor([1.0, math.inf]), torch.tensor([0, 0]), "group", "infinite"),
        (REWARDS, GROUPS, "batch", "std must be 'group' or 'global', not 'batch'"),
    ],
)
def test_rewards_that_cannot_be_compared_are_refused(rewards, groups, std, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, groups, std)


# --------------------------------------------------------------------------------------------- the clipped loss


def test_the_first_update_has_a_ratio_of_one_no_clipping_and_the_policy_gradient():
    """The density is computed anew by a network with a graph, from the latents that were drawn."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(6, 4, 4, 4, generator=generator), torch.randn(6, 4, 4, 4, generator=generator)
    network = torch.nn.Conv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        transition = flow_sde(x, network(x), 0.7, 0.6, 0.7)
        x_next = draw(transition, noise)
        old = log_prob(x_next, *transition)
    advantages = torch.tensor([1.0, -1.0, 0.5, 0.0, -2.0, 5.0])
    new = log_prob(x_next, *flow_sde(x, network(x), 0.7, 0.6, 0.7))
    loss, ratio, clipped = clipped_policy_loss(new, old, advantages, clip_range=1e-5)
    assert (ratio == 1).all() and not clipped.any()
    torch.testing.assert_close(loss, -advantages)
    got = torch.autograd.grad(loss.sum(), network.parameters(), retain_graph=True)
    want = torch.autograd.grad(-(advantages * new).sum(), network.parameters())
    for a, b in zip(got, want, strict=True):
        assert a.abs().max() > 1e-4
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.1, 2.0, -2.2, False),  # inside the range
        (1.5, 2.0, -2.4, True),  # gone far enough in the wanted direction: held at 1.2
        (0.5, 2.0, -1.0, False),  # gone the wrong way: must come back
        (0.5, -2.0, 1.6, True),  # held at 0.8
        (1.5, -2.0, 3.0, False),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_the_loss_is_ppos_and_its_gradient_stops_where_it_is_clipped(ratio, advantage, loss, clipped):
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    got, got_ratio, got_clipped = clipped_policy_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    torch.testing.assert_close(got, torch.tensor([loss]))
    torch.testing.assert_close(got_ratio, torch.tensor([ratio]))
    assert got_clipped.tolist() == [clipped]
    got.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([0.0 if clipped else -advantage * ratio]))


def test_the_old_policy_and_the_advantages_get_no_gradient():
    new, old, advantages = (torch.zeros(3, requires_grad=True) for _ in range(3))
    clipped_policy_loss(new, old, advantages + 1, 0.1)[0].sum().backward()
    assert new.grad is not None and old.grad is None and advantages.grad is None


def test_a_clip_range_means_what_the_reduction_says():
    """With D elements the sum's log-ratio is D times the mean's: (1 + c)^D of the sum is 1 + c of the mean."""
    generator = torch.Generator().manual_seed(0)
    x_next, mean, other = (torch.randn(64, 4, 5, 5, dtype=torch.float64, generator=generator) for _ in range(3))
    std, advantages = torch.full((64,), 0.5, dtype=torch.float64), torch.ones(64)
    change = mean + 1e-3 * other
    clips = {"mean": 1e-5, "sum": (1 + 1e-5) ** 100 - 1}
    ratios, masks = {}, {}
    for reduction, clip in clips.items():
        new, old = (log_prob(x_next, m, std, reduction) for m in (change, mean))
        _, ratios[reduction], masks[reduction] = clipped_policy_loss(new, old, advantages, clip)
    torch.testing.assert_close(ratios["sum"], ratios["mean"] ** 100)
    assert torch.equal(masks["sum"], masks["mean"]) and masks["sum"].any() and not masks["sum"].all()


@pytest.mark.parametrize(
    ("advantages", "clip", "message"),
    [
        (torch.zeros(3), 0.0, "clip_range must be positive, not 0.0"),
        (torch.zeros(3, 1), 0.1, r"not \(3,\), \(3,\) and \(3, 1\)"),
    ],
)
def test_wrong_calls_are_refused(advantages, clip, message):
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(torch.zeros(3), torch.zeros(3), advantages, clip)


# --------------------------------------------------------------------------------------------- ratios and divergences


def step_of(size: int, drift: float, samples: int = 32, dtype: torch.dtype = torch.float64):
    """(x_next, mean, old_mean, std) of steps drawn by the old policy, on a grid of size by size."""
    generator = torch.Generator().manual_seed(0)
    old, noise, change = (torch.randn(samples, 1, size, size, generator=generator, dtype=dtype) for _ in range(3))
    std = torch.linspace(0.2, 0.9, samples, dtype=dtype)
    return old + std.view(-1, 1, 1, 1) * noise, old + drift * change, old, std


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_plain_ratio_is_that_of_the_densities(reduction):
    x, mean, old, std = step_of(8, 0.1)
    expected = log_prob(x, mean, std, reduction) - log_prob(x, old, std, reduction)
    torch.testing.assert_close(log_ratio(x, mean, old, std, reduction), expected)
    torch.testing.assert_close(log_ratio(list(x), list(mean), list(old), std, reduction), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_guarded_ratio_is_the_papers_formula(reduction):
    x, mean, old, std = step_of(8, 0.1)
    total = 1 if reduction == "mean" else 64
    bias = total * (mean - old).square().flatten(1).mean(1) / (2 * std**2)
    expected = std * (log_prob(x, mean, std, reduction) - log_prob(x, old, std, reduction) + bias)
    torch.testing.assert_close(log_ratio(x, mean, old, std, reduction, "guard"), expected)


def test_under_drift_the_guarded_ratio_is_zero_on_average_and_the_plain_one_is_not():
    x, mean, old, std = step_of(64, 0.02, samples=256)
    bias = -divergence(mean, old, std)  # -mean(drift^2) / (2 std^2)
    plain, guarded = log_ratio(x, mean, old, std), log_ratio(x, mean, old, std, ratio="guard")
    spread = 0.02 / 64 / 16  # of a mean over 4096 elements and 256 samples
    assert abs(float(guarded.mean())) < 4 * spread
    assert abs(float((std * (plain - bias)).mean())) < 4 * spread and float(bias.mean()) < -1e-3


def test_nothing_changed_is_a_ratio_of_exactly_one():
    x, _, old, std = step_of(8, 0.0, dtype=torch.float32)
    for ratio in ("plain", "guard"):
        assert torch.equal(log_ratio(x, old.clone(), old, std, ratio=ratio).exp(), torch.ones(32))
    assert not divergence(old.clone(), old, std).any()


def test_a_small_drift_is_not_lost_in_float32():
    """The difference of two densities is off by a digit of the density itself, which is a tenth of such a ratio."""
    x, mean, old, std = step_of(64, 3e-5)
    exact = log_ratio(x, mean, old, std)
    single = [tensor.float() for tensor in (x, mean, old, std)]
    got = log_ratio(*single)
    crude = log_prob(single[0], single[1], single[3]) - log_prob(single[0], single[2], single[3])
    error, crude_error = ((value.double() - exact).abs().max() for value in (got, crude))
    assert error < 0.01 * exact.abs().max() and crude_error > 5 * error


@pytest.mark.parametrize("kernel", [flow_sde, dance_sde, cps])
def test_latents_stored_in_bfloat16_would_spoil_the_ratio(kernel):
    """Of a policy that has not changed: exactly 1 from float32 latents, far outside of a clip range of 1e-5 else."""
    generator = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(16, 4, 8, 8, generator=generator) for _ in range(3))
    made = kernel(x, v, 0.8, 0.7, 0.7)
    reached = draw(made, noise)
    stored, reached_stored = x.bfloat16().float(), reached.bfloat16().float()
    again = kernel(stored, v, 0.8, 0.7, 0.7)
    assert (log_ratio(reached, kernel(x, v, 0.8, 0.7, 0.7).mean, made.mean, made.std).exp() == 1).all()
    assert (log_ratio(reached_stored, again.mean, made.mean, made.std).exp() - 1).abs().max() > 1e-5


def test_a_penalty_has_a_gradient_towards_the_other_and_none_for_it():
    mean, other = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    mean, other, std = mean.requires_grad_(), other.requires_grad_(), torch.tensor([0.3, 0.5, 0.7])
    penalty = divergence(mean, other, std)
    torch.testing.assert_close(penalty, (mean - other).square().flatten(1).mean(1) / (2 * std**2))
    penalty.sum().backward()
    torch.testing.assert_close(mean.grad, (mean - other).detach() / (32 * std.view(-1, 1, 1, 1) ** 2))
    assert other.grad is None
    torch.testing.assert_close(divergence(mean, other, std, "sum"), 32 * penalty)
    gaussians = [torch.distributions.Normal(at.double(), std.view(-1, 1, 1, 1).double()) for at in (mean, other)]
    expected = torch.distributions.kl_divergence(*gaussians).flatten(1).sum(1)
    torch.testing.assert_close(divergence(mean, other, std, "sum").double(), expected)


@pytest.mark.parametrize(
    ("ratio", "moved", "advantage", "masked"),
    [
        (1.2, 0.5, 1.0, False),  # has not moved far enough
        (1.2, 1.0, 1.0, True),  # far enough, and would go on
        (0.8, 2.0, 1.0, False),  # comes back
        (0.8, 2.0, -1.0, True),
        (1.2, 2.0, -1.0, False),
        (1.2, 2.0, 0.0, False),  # has nothing to say anyway
    ],
)
def test_a_sample_is_masked_where_the_policy_has_gone_far_and_would_go_further(ratio, moved, advantage, masked):
    given = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, got, stopped = masked_policy_loss(given, torch.tensor([moved]), torch.tensor([advantage]), 1.0)
    torch.testing.assert_close(loss, torch.tensor([-advantage * ratio]))
    torch.testing.assert_close(got, torch.tensor([ratio]))
    assert stopped.tolist() == [masked]
    loss.sum().backward()
    torch.testing.assert_close(given.grad, torch.tensor([0.0 if masked else -advantage * ratio]))


def test_the_spread_of_a_group_is_that_of_its_pairs():
    samples = list(torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    samples[3:] = [samples[3]] * 3  # the second group has forgotten all but one
    first, second = group_spread(samples, 3).tolist()
    pairs = [(samples[i] - samples[j]).square().mean() for i in range(3) for j in range(i)]
    assert first == pytest.approx(float(torch.stack(pairs).mean().sqrt())) and second == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: log_ratio(x, x, x, torch.ones(2), ratio="none"), "ratio must be 'plain' or 'guard', not 'none'"),
        (lambda x: log_ratio(x, x, x, torch.ones(2), "max"), "reduction must be 'mean' or 'sum', not 'max'"),
        (lambda x: divergence(x, x, torch.tensor([1.0, 0.0])), r"without noise \(std = 0\) has no density"),
        (lambda x: masked_policy_loss(x[:, 0], x[:, 0], x[:, 0], 0.0), "threshold must be positive, not 0.0"),
        (lambda x: masked_policy_loss(x[:, 0], x[:1, 0], x[:, 0], 1.0), r"not \(2,\), \(1,\) and \(2,\)"),
    ],
)
def test_what_has_no_ratio_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
