"""DiffusionNFT's loss against its formula written in its own clock, and what its gradient must be."""

import pytest
import torch

from zimage_lit.objectives import flow_matching
from zimage_lit.objectives.forward_process import forward_process_loss, lag, optimality

T = torch.tensor([0.05, 0.4, 0.7, 0.95])


def samples(seed: int = 0):
    """(velocity, old velocity, noisy, clean, noise), float32 (4, 2, 3, 5)."""
    generator = torch.Generator().manual_seed(seed)
    v, old, noise, clean = (torch.randn(4, 2, 3, 5, generator=generator) for _ in range(4))
    return v, old, flow_matching.interpolate(noise, clean, T), clean, noise


@pytest.mark.parametrize("mixing", [1.0, 0.1])
def test_the_loss_is_the_papers_in_the_papers_clock(mixing):
    """There t = 1 is noise, v = noise - clean, and a clean sample is x_t - t v."""
    v, old, noisy, clean, _ = samples()
    advantages = torch.tensor([-7.0, -1.0, 0.5, 5.0])
    for i in range(4):
        time, theirs, theirs_old = 1 - float(T[i]), -v[i].double(), -old[i].double()
        q = min(max(float(advantages[i]) / 5, -1), 1) / 2 + 0.5
        expected = 0.0
        for share, sign in ((q, 1), (1 - q, -1)):
            mixed = theirs_old + sign * mixing * (theirs - theirs_old)
            error = noisy[i].double() - time * mixed - clean[i].double()
            expected += 5 / mixing * share * float(error.square().mean() / error.abs().mean())
        loss = forward_process_loss(v, old, noisy, clean, T, advantages, mixing)
        assert float(loss[i]) == pytest.approx(expected, rel=1e-5)
    lists = forward_process_loss(list(v), list(old), list(noisy), list(clean), T, advantages, mixing)
    torch.testing.assert_close(lists, loss)


@pytest.mark.parametrize("mixing", [1.0, 0.1])
def test_where_the_policy_is_the_old_one_the_gradient_is_the_advantage_times_that_of_supervised_learning(mixing):
    v, _, noisy, clean, noise = samples()
    advantages = torch.tensor([0.0, 5.0, -2.5, 1.0])
    asked = v.clone().requires_grad_()
    loss = forward_process_loss(asked, v, noisy, clean, T, advantages, mixing)
    (gradient,) = torch.autograd.grad(loss.sum(), asked)
    supervised = v.clone().requires_grad_()
    error = flow_matching.loss(supervised, flow_matching.target_velocity(noise, clean))
    (direction,) = torch.autograd.grad(error.sum(), supervised)
    remaining = (1 - T) ** 2 / (noisy + (1 - T.view(-1, 1, 1, 1)) * v - clean).abs().flatten(1).mean(1)
    torch.testing.assert_close(gradient, (advantages * remaining).view(-1, 1, 1, 1) * direction, rtol=1e-4, atol=1e-6)
    assert not gradient[0].abs().max() > 1e-6 and direction[0].abs().max() > 1e-3  # q = 1/2 says nothing


def test_nobody_else_gets_a_gradient_and_a_clean_sample_that_is_met_does_no_harm():
    v, old, noisy, clean, noise = (tensor.requires_grad_() for tensor in samples())
    loss = forward_process_loss(v, old, noisy.detach(), clean.detach(), T, torch.ones(4))
    loss.sum().backward()
    assert v.grad.abs().max() > 0 and old.grad is None
    exact = flow_matching.target_velocity(noise, clean).detach().requires_grad_()
    loss = forward_process_loss(exact, exact.detach(), noisy.detach(), clean.detach(), T, torch.ones(4))
    loss.sum().backward()
    assert loss.abs().max() < 1e-2 and exact.grad.isfinite().all()


def test_how_good_a_sample_is():
    found = optimality(torch.tensor([-9.0, -5.0, 0.0, 1.0, 5.0, 9.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.5, 0.6, 1.0, 1.0]))


def test_the_old_policy_lags_more_and_more():
    assert [lag(n) for n in (0, 1, 499, 500, 9999)] == [0.0, 0.001, 0.499, 0.5, 0.5]
    assert [lag(n, 75, 0.0075, 0.999) for n in (0, 75, 85, 500)] == [0.0, 0.0, pytest.approx(0.075), 0.999]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: forward_process_loss(v, v, v, v, torch.ones(2), torch.ones(2), 0.0), "mixing must lie in"),
        (lambda v: forward_process_loss(v, v[:1], v, v, torch.ones(2), torch.ones(2)), "2 and 1 samples"),
        (lambda v: optimality(torch.ones(2), 0.0), "clip must be positive"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3))
