import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from mixtures import Mixture, one_dimensional
from torch.distributions import Normal

from zimage_lit.errors import UserError
from zimage_lit.objectives import flow_matching
from zimage_lit.objectives.policy import clipped_policy_loss
from zimage_lit.objectives.transitions import (
    TRANSITIONS,
    check_transition,
    cps,
    dance_sde,
    draw,
    flow_sde,
    log_prob,
    ode,
    renoise,
    velocity_weight,
)
from zimage_lit.sampling import schedules, solvers

SHAPES = [(4, 2, 2), (4, 6, 2), (2, 4, 4)]
LEVELS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "ode": 0.0, "renoise": 1.0}
RANDOM = [name for name in TRANSITIONS if name != "ode"]


def some(seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]


# ------------------------------------------------------------------------------- against the sources' own formulas


def as_published(name, x, v, sigma, sigma_next, level):
    """The sources' formulas in their own clock, where time runs down and the velocity is noise − data."""
    v, dt = -v, sigma_next - sigma
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    if name == "flow_sde":
        g = level * math.sqrt(sigma / (1 - (sigma if sigma < 1 else sigma_next)))
        mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, g * math.sqrt(-dt)
    if name == "dance_sde":
        mean = x + (v + 0.5 * level**2 * (x - (1 - sigma) * clean) / sigma**2) * dt
        return mean, level * math.sqrt(-dt)
    if name == "cps":
        std = sigma_next * math.sin(level * math.pi / 2)
        return (1 - sigma_next) * clean + math.sqrt(sigma_next**2 - std**2) * noise, std
    if name == "renoise":
        return (1 - sigma_next) * clean, sigma_next
    return x + v * dt, 0.0


@pytest.mark.parametrize("sigmas", [(1.0, 0.9), (0.6, 0.35), (0.125, 0.0)])
@pytest.mark.parametrize("name", TRANSITIONS)
def test_a_kernel_is_the_published_one_in_the_house_clock(name, sigmas):
    x, v = some(0), some(1)
    mean, std = TRANSITIONS[name](x, v, *sigmas, LEVELS[name])
    for got, got_std, x_i, v_i in zip(mean, std, x, v, strict=True):
        want, want_std = as_published(name, x_i, v_i, *sigmas, LEVELS[name])
        torch.testing.assert_close(got, want)
        assert float(got_std) == pytest.approx(want_std, abs=1e-12)


def test_flow_sde_takes_a_given_level_for_the_first_step():
    x, v = some(0), some(1)
    _, std = flow_sde(x, v, 1.0, 0.9, 0.7, sigma_max=0.98)
    torch.testing.assert_close(std, torch.full((3,), 0.7 * math.sqrt(1 / 0.02) * math.sqrt(0.1)).double())


@pytest.mark.parametrize("name", TRANSITIONS)
def test_samples_at_levels_of_their_own_equal_samples_alone(name):
    x, v, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    now, after = torch.tensor([1.0, 0.7, 0.3]), torch.tensor([0.8, 0.6, 0.1])
    together = TRANSITIONS[name](x, v, now, after, LEVELS[name])
    listed = TRANSITIONS[name](list(x), list(v), now, after, LEVELS[name])
    torch.testing.assert_close(torch.stack(listed.mean), together.mean)
    for i in range(3):
        alone = TRANSITIONS[name](x[i : i + 1], v[i : i + 1], float(now[i]), float(after[i]), LEVELS[name])
        torch.testing.assert_close(alone.mean[0], together.mean[i])
        torch.testing.assert_close(alone.std[0], together.std[i])
        torch.testing.assert_close(draw(alone, noise[i : i + 1])[0], draw(listed, list(noise))[i])


def test_the_true_velocity_leads_along_the_path():
    """x̂1, x̂0 and v of one point belong together: the kernels' means are points of the path, or parts of them."""
    noise, data = some(0), some(1)
    t, t_next = torch.full((3,), 0.3, dtype=torch.float64), torch.full((3,), 0.45, dtype=torch.float64)
    x, v = flow_matching.interpolate(noise, data, t), flow_matching.target_velocity(noise, data)
    path = flow_matching.interpolate(noise, data, t_next)
    for transition in (ode(x, v, 0.7, 0.55), cps(x, v, 0.7, 0.55, 0.0), dance_sde(x, v, 0.7, 0.55, 0.0)):
        assert not transition.std.any()
        for got, want in zip(transition.mean, path, strict=True):
            torch.testing.assert_close(got, want)
    for got, want in zip(renoise(x, v, 0.7, 0.55).mean, data, strict=True):
        torch.testing.assert_close(got, 0.45 * want)


def test_without_noise_the_kernels_are_the_ordinary_differential_equation():
    x, v = some(2), some(3)
    certain = ode(x, v, 0.7, 0.5).mean
    for kernel in (flow_sde, dance_sde, cps):
        for got, want in zip(kernel(x, v, 0.7, 0.5, 0.0).mean, certain, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["euler", "cps", "renoise"])
def test_a_chain_of_transitions_is_the_solver_of_that_name(name):
    start, levels = some(4), schedules.sigmas(5, 3.0)
    fresh = [some(10 + step) for step in range(5)]
    options = {"cps": {"eta": 0.8}, "renoise": {}}
    extra = {**options[name], "fresh_noise": fresh.__getitem__} if name in options else {}

    def velocity(latents, t):
        return [t - 0.5 * x + x.flip(-1) for x in latents]

    expected = solvers.SOLVERS[name](velocity, start, levels, **extra)
    kernel, latents = TRANSITIONS[{"euler": "ode"}.get(name, name)], start
    for i in range(5):
        now, after = float(levels[i]), float(levels[i + 1])
        latents = draw(kernel(latents, velocity(latents, 1 - now), now, after, 0.8), fresh[i])
    for got, want in zip(latents, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_what_comes_out_is_float32_when_the_network_is_not():
    x, v = some(0, torch.float32), some(1, torch.float32)
    for name, kernel in TRANSITIONS.items():
        transition = kernel(x, [one.bfloat16() for one in v], 0.7, 0.5, LEVELS[name])
        rounded = kernel(x, [one.bfloat16().float() for one in v], 0.7, 0.5, LEVELS[name])
        assert transition.std.dtype == torch.float32 and transition.mean[0].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(transition.mean, rounded.mean, strict=True))


# --------------------------------------------------------------------------------------------- marginals


STEPS, SAMPLES = (10, 200), 20_000


def quantiles(mixture: Mixture, shares: torch.Tensor) -> torch.Tensor:
    grid = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    return torch.from_numpy(np.interp(shares.numpy(), mixture.cumulative(grid).numpy(), grid.numpy()))


def distances_to_data(name: str, level: float) -> list[float]:
    """Wasserstein-1 distance between the mixture and what a kernel makes of noise in a few and in many steps."""
    mixture, generator = one_dimensional(), torch.Generator().manual_seed(0)
    even = (torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES
    found = []
    for steps in STEPS:
        x = torch.special.ndtri(even)[:, None]
        levels = schedules.sigmas(steps).double().tolist()
        for now, after in pairwise(levels):
            transition = TRANSITIONS[name](x, mixture.velocity(x, 1 - now), now, after, level)
            x = draw(transition, torch.randn(x.shape, generator=generator, dtype=x.dtype))
        found.append(float((x[:, 0].sort().values - quantiles(mixture, even)).abs().mean()))
    return found


def floor() -> float:
    """The same distance of as many true samples, on average: √(2/(π·n))·∫√(F·(1 − F)), F the distribution function."""
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    share = one_dimensional().cumulative(grid).clamp(0, 1)
    return math.sqrt(2 / (math.pi * SAMPLES)) * float(torch.trapezoid((share * (1 - share)).sqrt(), grid))


@pytest.mark.parametrize("name", ["ode", "flow_sde", "dance_sde"])
def test_differential_equations_reach_the_data_as_steps_grow(name):
    few, many = distances_to_data(name, LEVELS[name])
    assert few > 4 * floor() and many < 2 * floor()


@pytest.mark.parametrize(("name", "level"), [("cps", 0.7), ("renoise", 1.0)])
def test_cps_and_renoise_never_reach_the_data(name, level):
    _, many = distances_to_data(name, level)
    assert many > 5 * floor()


@pytest.mark.parametrize(("name", "order"), [("flow_sde", 2), ("dance_sde", 2), ("ode", 2), ("cps", 0)])
def test_what_one_step_does_to_the_variance_of_a_gaussian(name, order):
    """All is linear there, so the error of the next variance is exact: O(h²) is an equation solved, O(1) is not."""
    data_std, now = 0.6, 0.5

    def variance(sigma: float) -> float:
        return (1 - sigma) ** 2 * data_std**2 + sigma**2

    def error(step: float) -> float:
        x = torch.ones(1, 1, dtype=torch.float64)
        slope = ((1 - now) * data_std**2 - now) / variance(now)
        mean, std = TRANSITIONS[name](x, slope * x, now, now - step, 0.5)
        return float(mean**2 * variance(now) + std**2) - variance(now - step)

    rate = math.log2(error(0.002) / error(0.001))
    assert abs(rate - order) < 0.1
    if name == "cps":
        assert error(0.001) < -0.005  # it contracts


# --------------------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", RANDOM)
def test_log_prob_is_that_of_the_normal_distribution(name, reduction):
    transition = TRANSITIONS[name](some(0), some(1), 0.7, 0.5, LEVELS[name])
    x_next = draw(transition, some(2))
    got = log_prob(x_next, *transition, reduction=reduction)
    assert got.shape == (3,)
    for value, x, mean, std in zip(got, x_next, *transition, strict=True):
        torch.testing.assert_close(value, getattr(Normal(mean, std).log_prob(x), reduction)())


@pytest.mark.parametrize("kernel", list(TRANSITIONS))
@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9), (0.7, 0.4), (0.2, 0.0)])
def test_the_weight_of_the_velocity_is_the_derivative_of_the_mean(kernel, sigma, sigma_next):
    x, v = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v.requires_grad_()
    (slope,) = torch.autograd.grad(TRANSITIONS[kernel](x, v, sigma, sigma_next, 0.6).mean.sum(), v)
    weight = velocity_weight(kernel, sigma, sigma_next, 0.6)
    torch.testing.assert_close(slope, torch.full_like(slope, weight))
    if kernel == "flow_sde" and sigma < 1:
        assert weight == pytest.approx((sigma - sigma_next) * (1 + 0.6**2 / 2))


def test_log_prob_of_a_draw_has_the_expectation_of_its_entropy():
    transition = flow_sde(torch.zeros(1, 100_000), torch.zeros(1, 100_000), 0.7, 0.6, 0.7)
    x_next = draw(transition, torch.randn(1, 100_000, generator=torch.Generator().manual_seed(0)))
    entropy = Normal(0.0, transition.std).entropy()
    torch.testing.assert_close(log_prob(x_next, *transition), -entropy, atol=0.01, rtol=0)


def test_the_gradient_of_log_prob_is_the_closed_form():
    mean = [x.requires_grad_() for x in some(0)]
    x_next, std = some(1), torch.tensor([0.2, 0.5, 1.5], dtype=torch.float64)
    log_prob(x_next, mean, std).sum().backward()
    for x, m, s in zip(x_next, mean, std, strict=True):
        torch.testing.assert_close(m.grad, (x - m.detach()) / s**2 / m.numel())


def test_the_mean_does_not_depend_on_the_size_of_a_picture_and_the_sum_does():
    x_next, mean, std = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([0.3, 0.6])
    large_x, large_mean = x_next.repeat(1, 1, 3, 3), mean.repeat(1, 1, 3, 3)
    for reduction, factor in (("mean", 1), ("sum", 9)):
        small = log_prob(x_next, mean, std, reduction=reduction)
        torch.testing.assert_close(log_prob(large_x, large_mean, std, reduction=reduction), factor * small)
    torch.testing.assert_close(log_prob(x_next, mean, std, "sum"), 16 * log_prob(x_next, mean, std, "mean"))


def test_the_published_log_prob_of_cps_is_that_of_one_std_for_all_levels():
    x_next, mean, std = some(0), some(1), torch.full((3,), math.sqrt(0.5), dtype=torch.float64)
    differences = log_prob(x_next, mean, std) + torch.stack(
        [(x - m).square().mean() for x, m in zip(x_next, mean, strict=True)]
    )
    torch.testing.assert_close(differences, differences[:1].expand(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sigma", [0.95, 0.2, 0.1])
def test_latents_stored_in_half_precision_shift_the_density_by_what_rounding_predicts(dtype, sigma):
    """Rounded after its density was taken: −(rounding error)²/(2·std²) on average, the errors even within a digit."""
    generator = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(4, 16, 64, 64, generator=generator) for _ in range(3))
    transition = flow_sde(x, v, sigma, sigma - 0.1, 0.7)
    x_next = draw(transition, noise)
    shifts = log_prob(x_next.to(dtype).float(), *transition) - log_prob(x_next, *transition)
    digit = torch.finfo(dtype).eps * torch.exp2(torch.floor(torch.log2(x_next.abs())))
    predicted = -digit.square().mean() / 12 / (2 * transition.std[0] ** 2)
    chance = 3 * digit.square().mean().sqrt() / math.sqrt(12) / transition.std[0] / math.sqrt(x_next.numel())
    assert abs(float(shifts.mean() - predicted)) < float(chance)
    if dtype == torch.bfloat16 and sigma < 0.5:  # then rounding alone is beyond the published clip ranges
        assert 5e-5 < -float(predicted) < 1e-3 and (shifts < -5e-5).all()


def test_a_latent_rounded_before_its_density_is_taken_gives_a_ratio_of_exactly_one():
    generator = torch.Generator().manual_seed(0)
    x, v, noise = (torch.randn(8, 16, 8, 8, generator=generator) for _ in range(3))
    transition = flow_sde(x, v, 0.1, 0.05, 0.7)
    exact = draw(transition, noise)
    stored, advantages = exact.bfloat16(), torch.tensor([1.0, -1.0]).repeat(4)
    again = log_prob(stored.float(), *transition)
    _, ratio, clipped = clipped_policy_loss(again, log_prob(exact, *transition), advantages, 1e-5)
    assert clipped.any() and (ratio != 1).all()
    _, ratio, clipped = clipped_policy_loss(again, log_prob(stored.float(), *transition), advantages, 1e-5)
    assert (ratio == 1).all() and not clipped.any()


# --------------------------------------------------------------------------------------------- refusals


def test_a_certain_step_has_no_density():
    x, v = some(0), some(1)
    for mean, std in (ode(x, v, 0.5, 0.4), renoise(x, v, 0.1, 0.0)):
        with pytest.raises(ValueError, match="no density"):
            log_prob(mean, mean, std)


def test_wrong_calls_are_refused():
    x, v = some(0), some(1)
    with pytest.raises(ValueError, match="3 and 2 samples"):
        flow_sde(x, v[:2], 0.5, 0.4, 0.7)
    with pytest.raises(ValueError, match="Sample 0 has shape"):
        cps(x, v[::-1], 0.5, 0.4, 0.7)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', not 'median'"):
        log_prob(x, v, torch.ones(3), reduction="median")


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("sde", 0.7, "transition must be one of flow_sde, dance_sde, cps, ode, renoise, not sde"),
        ("flow_sde", 0.0, "positive and finite for the transition flow_sde, not 0.0"),
        ("dance_sde", math.nan, "positive and finite for the transition dance_sde, not nan"),
        ("cps", 1.2, r"in \(0, 1\] for the transition cps .*, not 1.2"),
    ],
)
def test_kernels_that_cannot_be_are_refused(name, level, message):
    with pytest.raises(UserError, match=message):
        check_transition(name, level)


@pytest.mark.parametrize("name", TRANSITIONS)
def test_kernels_that_can_be_are_accepted(name):
    check_transition(name, LEVELS[name])
