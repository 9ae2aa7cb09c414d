import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from zimage_lit.objectives.distillation import (
    blend,
    ca_direction,
    cosine,
    dm_direction,
    fake_score_loss,
    gap,
    mean_variance_loss,
    normaliser,
    pseudo_loss,
)
from zimage_lit.sampling.guidance import guided

SHAPES = [(4, 2, 2), (4, 6, 2), (2, 4, 4)]
BEYOND = 100.0  # a clamp that every distance stays below, so that all normalisers are this number


def some(seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def assert_close(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------- the directions


def test_the_directions_are_their_formulas_written_out():
    x, teacher, other = some(0), some(1), some(2)
    dm, ca = dm_direction(x, teacher, other), ca_direction(x, teacher, other, 4.5)
    for x_i, r, f, dm_i, ca_i in zip(x, teacher, other, dm, ca, strict=True):
        scale = float((x_i - r).abs().sum()) / x_i.numel()
        assert scale > 0.1
        torch.testing.assert_close(dm_i, (f - r) / scale)
        torch.testing.assert_close(ca_i, -3.5 * (r - f) / scale)


def test_lists_and_tensors_agree():
    x, teacher, other = (torch.stack(some(seed, [(4, 2, 6)] * 3)) for seed in range(3))
    for function, extra in ((dm_direction, ()), (ca_direction, (3.0,)), (gap, ())):
        listed = function(list(x), list(teacher), list(other), *extra)
        listed = listed if isinstance(listed, torch.Tensor) else torch.stack(listed)
        torch.testing.assert_close(listed, function(x, teacher, other, *extra))
    for function in (pseudo_loss, cosine):
        torch.testing.assert_close(function(list(x), list(other)), function(x, other))
    torch.testing.assert_close(fake_score_loss(list(x), list(teacher), list(other)), fake_score_loss(x, teacher, other))
    torch.testing.assert_close(mean_variance_loss(list(x), 0.5, 2.0), mean_variance_loss(x, 0.5, 2.0))


def test_a_fake_score_that_equals_the_teacher_and_no_guidance_leave_no_gradient():
    x = [sample.requires_grad_() for sample in some(0)]
    teacher, unconditional = some(1), some(2)
    loss = pseudo_loss(x, dm_direction(x, teacher, teacher))
    loss = loss + pseudo_loss(x, ca_direction(x, teacher, unconditional, guidance_scale=1.0))
    assert not loss.any()
    loss.sum().backward()
    assert all(not sample.grad.any() for sample in x)


def test_the_gradient_of_the_pseudo_loss_is_the_direction():
    x, direction = [sample.requires_grad_() for sample in some(0)], some(1)
    loss = pseudo_loss(x, direction)
    torch.testing.assert_close(loss, torch.stack([0.5 * d.square().mean() for d in direction]))
    weights = torch.tensor([1.0, -2.0, 0.5])  # the caller's, of a sample: advantages, say
    (weights * loss).sum().backward()
    assert_close([sample.grad for sample in x], [w * d / d.numel() for w, d in zip(weights, direction, strict=True)])


def test_the_directions_are_float32_and_carry_no_graph():
    x, teacher, other = ([sample.bfloat16().requires_grad_() for sample in some(seed)] for seed in range(3))
    for direction in (dm_direction(x, teacher, other), ca_direction(x, teacher, other, 3.0)):
        assert all(sample.dtype == torch.float32 and not sample.requires_grad for sample in direction)
    pseudo_loss(x, dm_direction(x, teacher, other)).sum().backward()
    assert all(sample.grad is not None for sample in x)
    assert all(sample.grad is None for sample in teacher + other)


def test_a_small_step_moves_the_sample_towards_what_the_teacher_sees():
    """The fake score sees x itself where it has learned the student well; then the step leads to x̂_teacher."""
    x, teacher = some(0), some(1)
    for sample, r, direction in zip(x, teacher, dm_direction(x, teacher, x), strict=True):
        after = sample - 0.1 * direction
        assert (after - r).norm() < (sample - r).norm()
        torch.testing.assert_close(
            torch.cosine_similarity((after - sample).flatten(), (r - sample).flatten(), 0), torch.tensor(1.0)
        )


def test_guidance_moves_the_sample_from_the_unconditional_to_the_conditional():
    x, conditional, unconditional = some(0), some(1), some(2)
    step = [-direction for direction in ca_direction(x, conditional, unconditional, 3.0)]
    torch.testing.assert_close(
        cosine(step, [c - u for c, u in zip(conditional, unconditional, strict=True)]), torch.ones(3)
    )
    backwards = ca_direction(x, conditional, unconditional, 0.0)  # weaker guidance than none
    assert_close([2 * direction for direction in backwards], step)


# ---------------------------------------------------------------------------------- coupled and decoupled


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0, 7.5])
def test_coupled_equals_decoupled_where_time_noise_and_normaliser_are_shared(guidance_scale):
    x, conditional, unconditional, fake = (some(seed) for seed in range(4))
    coupled = dm_direction(x, guided(conditional, unconditional, guidance_scale), fake, clamp=BEYOND)
    dm = dm_direction(x, conditional, fake, clamp=BEYOND)
    ca = ca_direction(x, conditional, unconditional, guidance_scale, clamp=BEYOND)
    assert_close(coupled, [a + b for a, b in zip(dm, ca, strict=True)])


def test_the_guidance_term_at_a_shared_time_is_the_part_that_guidance_adds_to_coupled():
    x, conditional, unconditional, fake = (some(seed) for seed in range(4))
    strong = dm_direction(x, guided(conditional, unconditional, 4.0), fake, clamp=BEYOND)
    none = dm_direction(x, guided(conditional, unconditional, 1.0), fake, clamp=BEYOND)
    ca = ca_direction(x, conditional, unconditional, 4.0, clamp=BEYOND)
    assert_close([a - b for a, b in zip(strong, none, strict=True)], ca)


def test_with_normalisers_of_their_own_they_differ_by_nothing_else():
    x, conditional, unconditional, fake = (some(seed) for seed in range(4))
    mixed = guided(conditional, unconditional, 4.0)
    coupled = dm_direction(x, mixed, fake)
    dm, ca = dm_direction(x, conditional, fake), ca_direction(x, conditional, unconditional, 4.0)
    together, apart = normaliser(x, mixed, 0.1), normaliser(x, conditional, 0.1)
    assert ((together / apart - 1).abs() > 0.5).all()  # so that guidance has to be tuned again
    for i in range(3):
        torch.testing.assert_close(coupled[i] * together[i], (dm[i] + ca[i]) * apart[i])


# --------------------------------------------------------------------------------------------- normalisers


def test_the_normaliser_is_each_samples_own():
    x, teacher = some(0), some(1)
    expected = [float((a - b).abs().mean()) for a, b in zip(x, teacher, strict=True)]
    torch.testing.assert_close(normaliser(x, teacher, 0.1), torch.tensor(expected))
    order = [2, 0, 1]
    permuted = normaliser([x[i] for i in order], [teacher[i] for i in order], 0.1)
    assert torch.equal(permuted, normaliser(x, teacher, 0.1)[order])


@pytest.mark.parametrize("form", [list, torch.stack])
def test_a_direction_does_not_depend_on_the_batch(form):
    x, teacher, fake = (some(seed, [(4, 4, 4)] * 5) for seed in range(3))
    x[3] = 100 * x[3]  # one sample's outlier must not shrink the others' steps
    directions = dm_direction(form(x), form(teacher), form(fake))
    order = [4, 2, 0, 3, 1]
    permuted = dm_direction(*(form([batch[i] for i in order]) for batch in (x, teacher, fake)))
    for place, i in enumerate(order):
        assert torch.equal(permuted[place], directions[i])
        torch.testing.assert_close(dm_direction(x[i : i + 1], teacher[i : i + 1], fake[i : i + 1])[0], directions[i])


def test_where_the_teacher_agrees_with_the_sample_the_clamp_holds():
    x, fake = some(0), some(1)
    assert torch.equal(normaliser(x, x, 0.1), torch.full((3,), 0.1))
    assert_close(dm_direction(x, x, fake), [(f - r) / 0.1 for f, r in zip(fake, x, strict=True)])
    near = [sample + 0.05 for sample in x]
    assert_close(dm_direction(x, near, fake, clamp=0.02), [(f - r) / 0.05 for f, r in zip(fake, near, strict=True)])


# ------------------------------------------------------------------------------------- the gradient of a KL


def clean_of_gaussian(noisy: torch.Tensor, t: float, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """E[x1 | x_t] for x1 ~ N(mean, std²), what a perfect score function would see."""
    return mean + t * std**2 / (t**2 * std**2 + (1 - t) ** 2) * (noisy - t * mean)


def noised(mean: torch.Tensor, std: torch.Tensor, t: float) -> Normal:
    return Normal(t * mean, torch.sqrt(t**2 * std**2 + (1 - t) ** 2))


STUDENTS = [(1.5, 0.4), (-1.0, 2.0), (0.2, 0.9)]
TEACHER = torch.tensor(0.3), torch.tensor(0.7)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("student", STUDENTS)
def test_the_direction_is_the_gradient_of_the_divergence_between_the_noised_distributions(student, t):
    """E[direction·dx/dθ]·clamp = (sigma/t)²·d KL_t/dθ. All is linear, so quadrature takes the expectation exactly."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(4)
    z, eps = (torch.tensor(values.flatten(), dtype=torch.float32) for values in np.meshgrid(nodes, nodes))
    weight = torch.tensor(np.outer(weights, weights).flatten() / (2 * math.pi), dtype=torch.float32)
    mean, std = (torch.tensor(value, requires_grad=True) for value in student)
    x = (mean + std * z)[:, None]
    with torch.no_grad():
        noisy = t * x + (1 - t) * eps[:, None]
        seen, fake = clean_of_gaussian(noisy, t, *TEACHER), clean_of_gaussian(noisy, t, mean, std)
    loss = (weight * pseudo_loss(x, dm_direction(x, seen, fake, clamp=BEYOND))).sum()
    gradients = torch.autograd.grad(loss * BEYOND, (mean, std))
    divergence = kl_divergence(noised(mean, std, t), noised(*TEACHER, t))
    for got, want in zip(gradients, torch.autograd.grad(divergence, (mean, std)), strict=True):
        torch.testing.assert_close(got, ((1 - t) / t) ** 2 * want, rtol=1e-4, atol=1e-5)


def distilled(student: tuple[float, float], steps: int, sign: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(value, requires_grad=True) for value in student)
    optimizer = torch.optim.SGD([mean, std], lr=0.02)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        z, eps = torch.randn(2, 2048, 1, generator=generator)
        t = float(torch.rand((), generator=generator) * 0.96 + 0.02)
        x = mean + std * z
        with torch.no_grad():
            noisy = t * x + (1 - t) * eps
            seen, fake = clean_of_gaussian(noisy, t, *TEACHER), clean_of_gaussian(noisy, t, mean, std)
        optimizer.zero_grad()
        (sign * pseudo_loss(x, dm_direction(x, seen, fake))).mean().backward()
        optimizer.step()
    return mean.detach(), std.detach()


@pytest.mark.parametrize("student", STUDENTS)
def test_finite_steps_lower_the_divergence_and_steps_of_the_wrong_sign_raise_it(student):
    def divergence(of: tuple[float, float] | tuple[torch.Tensor, torch.Tensor]) -> float:
        return float(kl_divergence(Normal(*of), Normal(*TEACHER)))

    before = divergence(student)
    assert divergence(distilled(student, 1)) < before < divergence(distilled(student, 1, sign=-1.0))
    assert divergence(distilled(student, 300)) < min(0.01, 0.2 * before)


# --------------------------------------------------------------------------------------------- the other losses


def test_the_fake_score_learns_the_velocity_to_the_students_samples_and_gives_them_no_gradient():
    predicted, noise = [v.requires_grad_() for v in some(0)], some(1)
    samples = [x.requires_grad_() for x in some(2)]
    losses = fake_score_loss(predicted, noise, samples)
    expected = [(v - (x - z)).square().mean() for v, z, x in zip(predicted, noise, samples, strict=True)]
    torch.testing.assert_close(losses, torch.stack(expected))
    losses.sum().backward()
    assert all(x.grad is None for x in samples)
    with torch.no_grad():
        residuals = [2 * (v - (x - z)) / v.numel() for v, z, x in zip(predicted, noise, samples, strict=True)]
    assert_close([v.grad for v in predicted], residuals)


def test_the_mean_variance_loss_is_the_divergence_of_two_gaussians():
    x = some(0)
    losses = mean_variance_loss(x, 0.4, 1.7)
    expected = [kl_divergence(Normal(s.mean(), s.std(correction=0)), Normal(0.4, 1.7)) for s in x]
    torch.testing.assert_close(losses, torch.stack(expected))
    own = x[0].mean(), x[0].std(correction=0)
    torch.testing.assert_close(mean_variance_loss(x[:1], *own), torch.zeros(1), atol=1e-6, rtol=0)


def test_the_mean_variance_loss_may_go_channel_by_channel():
    x = some(0, [(4, 2, 6), (4, 8, 8)])
    mean, std = torch.tensor([0.0, 1.0, -1.0, 0.5]), torch.tensor([1.0, 2.0, 0.5, 1.5])
    expected = [
        torch.stack([mean_variance_loss(sample[None, c], mean[c], std[c])[0] for c in range(4)]).mean() for sample in x
    ]
    torch.testing.assert_close(mean_variance_loss(x, mean, std), torch.stack(expected))


def test_the_gradient_of_the_mean_variance_loss_is_the_closed_form():
    """½·[(s² + (m − μ)²)/σ² − 1 − ln(s²/σ²)] by x_j, with dm = 1/N and ds² = 2·(x_j − m)/N."""
    x, mean, std = some(0), 0.4, 1.7
    leaves = [sample.clone().requires_grad_() for sample in x]
    mean_variance_loss(leaves, mean, std).sum().backward()
    for leaf, sample in zip(leaves, x, strict=True):
        own_mean, own_variance = sample.mean(), sample.var(correction=0)
        of_variance = (sample - own_mean) * (1 / std**2 - 1 / own_variance)
        torch.testing.assert_close(leaf.grad, (of_variance + (own_mean - mean) / std**2) / sample.numel())


def test_an_even_sample_has_a_finite_mean_variance_loss():
    x = [torch.full((4, 2, 2), 0.3, requires_grad=True)]
    loss = mean_variance_loss(x, 0.0, 1.0)
    loss.sum().backward()
    assert loss.isfinite().all() and x[0].grad.isfinite().all()


@pytest.mark.parametrize(("decay", "dtype"), [(0.999, torch.float32), (0.0, torch.float32), (0.5, torch.bfloat16)])
def test_blending_moves_the_weights_in_place(decay, dtype):
    targets = [torch.nn.Parameter(x.to(dtype)) for x in some(0)]
    before, sources, same = [t.detach().clone() for t in targets], some(1), list(targets)
    blend(targets, sources, decay)
    for target, kept, source, old in zip(targets, same, sources, before, strict=True):
        assert target is kept and target.dtype == dtype and target.grad is None
        expected = decay * old.float() + (1 - decay) * source.to(dtype).float()
        torch.testing.assert_close(target.detach(), expected.to(dtype))


def test_decay_one_changes_nothing():
    targets, before = some(0), some(0)
    blend(targets, some(1), 1.0)
    assert all(torch.equal(a, b) for a, b in zip(targets, before, strict=True))


# --------------------------------------------------------------------------------------------- diagnostics


def test_the_gap_is_the_distance_of_the_two_scores_against_that_to_the_sample():
    x, teacher, fake = some(0), some(1), some(2)
    expected = [float((r - f).abs().mean() / (s - r).abs().mean()) for s, r, f in zip(x, teacher, fake, strict=True)]
    torch.testing.assert_close(gap(x, teacher, fake), torch.tensor(expected))
    assert not gap(x, teacher, teacher).any()
    assert not gap(x, x, x).any()  # and not 0/0


def test_the_cosine_is_that_of_the_whole_latent():
    a, b = some(0), some(1)
    expected = [float((p * q).sum() / (p.square().sum() * q.square().sum()).sqrt()) for p, q in zip(a, b, strict=True)]
    torch.testing.assert_close(cosine(a, b), torch.tensor(expected))
    torch.testing.assert_close(cosine(a, [-3 * x for x in a]), -torch.ones(3))
    assert not cosine(a, [torch.zeros_like(x) for x in a]).any()


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: dm_direction(x, y[:2], x[:2]), "3 and 2 samples"),
        (lambda x, y: dm_direction(x, y, y[::-1]), "Sample 0 has shape"),
        (lambda x, y: ca_direction(x, y, y[:2], 3.0), "3 and 2 samples"),
        (lambda x, y: dm_direction(x, y, y, clamp=0.0), "clamp must be positive, not 0.0"),
        (lambda x, y: pseudo_loss(x, torch.stack(x[:1] * 3)), "not one of each"),
        (lambda x, y: mean_variance_loss(x, 0.0, 0.0), "data_std must be positive, not 0.0"),
        (lambda x, y: blend(x, y, 1.5), r"decay must lie in \[0, 1\], not 1.5"),
        (lambda x, y: blend(x, y[:2], 0.5), "shorter"),
        (lambda x, y: gap(x, y, y[:2]), "3 and 2 samples"),
        (lambda x, y: cosine(x, y[::-1]), "Sample 0 has shape"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(some(0), some(1))
