import math

import pytest
import torch
from mixtures import one_dimensional, two_dimensional

from zimage_lit.sampling import sigmas
from zimage_lit.sampling.solvers import cps, euler, heun, renoise

SOLVERS = {"euler": (euler, 1), "heun": (heun, 2)}


@pytest.mark.parametrize(("solver", "steps"), [(euler, 200), (heun, 40)])
def test_transport_gives_the_mixtures_mean_and_covariance(solver, steps):
    mixture = two_dimensional()
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = solver(mixture.velocity, noise, sigmas(steps, 1.0))
    torch.testing.assert_close(samples.mean(0), mixture.mean(), atol=0.03, rtol=0)
    torch.testing.assert_close(torch.cov(samples.T), mixture.covariance(), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_error_falls_with_the_solvers_order(name):
    """In one dimension the exact flow is the quantile map: F_mixture(x(1)) = Φ(x(0))."""
    solver, order = SOLVERS[name]
    mixture = one_dimensional()
    noise = torch.linspace(-2, 2, 101, dtype=torch.float64)[:, None]

    def error(steps: int) -> float:
        end = solver(mixture.velocity, noise, sigmas(steps, 1.0).double())
        return float((mixture.cumulative(end[:, 0]) - torch.special.ndtr(noise[:, 0])).abs().max())

    rates = [math.log2(error(steps) / error(2 * steps)) for steps in (64, 128)]
    assert all(abs(rate - order) < 0.15 for rate in rates), rates


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_euler_step_on_a_gaussian_lands_on_its_mean(shift):
    mixture = two_dimensional()
    mixture.weights, mixture.means, mixture.stds = mixture.weights[:1] * 2, mixture.means[:1], mixture.stds[:1]
    noise = torch.randn(50, 2, dtype=torch.float64)
    end = euler(mixture.velocity, noise, sigmas(1, shift))
    torch.testing.assert_close(end, mixture.means.expand(50, 2))


def test_many_heun_steps_on_a_gaussian_follow_the_closed_form_path():
    mixture = two_dimensional()
    mixture.weights, mixture.means, mixture.stds = mixture.weights[:1] * 2, mixture.means[:1], mixture.stds[:1]
    noise = torch.randn(50, 2, dtype=torch.float64)
    end = heun(mixture.velocity, noise, sigmas(400, 1.0).double())
    torch.testing.assert_close(end, mixture.means + mixture.stds * noise, atol=1e-4, rtol=0)


def test_euler_on_a_linear_field_is_the_product_of_its_steps():
    levels = sigmas(8, 3.0).double()
    start = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    end = euler(lambda x, t: 1.5 * x, start, levels)
    torch.testing.assert_close(end, start * torch.prod(1 + 1.5 * (levels[:-1] - levels[1:])))


def test_a_constant_field_is_integrated_exactly_by_both():
    noise, data = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    for solver, _ in SOLVERS.values():
        torch.testing.assert_close(solver(lambda x, t: data - noise, noise, sigmas(5, 3.0)), data)


@pytest.mark.parametrize("name", SOLVERS)
def test_lists_of_any_shapes_are_solved_like_tensors(name):
    solver, _ = SOLVERS[name]
    levels = sigmas(4, 3.0)
    latents = [torch.randn(4, 2, 2), torch.randn(4, 6, 2)]
    together = solver(lambda xs, t: [t - x for x in xs], latents, levels)
    for latent, end in zip(latents, together, strict=True):
        assert torch.equal(end, solver(lambda x, t: t - x, latent[None], levels)[0])


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 4), ("heun", 7)])
def test_the_network_is_asked_at_t_below_one_only(name, evaluations):
    times = []
    SOLVERS[name][0](lambda x, t: times.append(t) or x, torch.zeros(1, 1, 1, 1), sigmas(4, 3.0))
    assert len(times) == evaluations
    assert min(times) == 0 and max(times) < 1


def fresh_noise(latents):
    def draw(step):
        return [torch.randn(x.shape, generator=torch.Generator().manual_seed(step), dtype=x.dtype) for x in latents]

    return draw


def test_cps_without_fresh_noise_is_eulers_method():
    mixture, levels = two_dimensional(), sigmas(6, 3.0)
    noise = torch.randn(50, 2, dtype=torch.float64)
    end = cps(mixture.velocity, noise, levels, eta=0.0, fresh_noise=lambda step: torch.randn_like(noise))
    torch.testing.assert_close(end, euler(mixture.velocity, noise, levels))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_cps_is_its_formula_written_out(eta):
    """Also for lists: clean and noise as the velocity says, part of the noise replaced, mixed at the next level."""
    latents, levels = [torch.randn(4, 2, 2), torch.randn(4, 2, 6)], sigmas(3, 2.0).tolist()
    draw, seen = fresh_noise(latents), []
    ends = cps(
        lambda xs, t: [t - 0.5 * x for x in xs], latents, levels, lambda i, x: seen.append(i), eta=eta, fresh_noise=draw
    )
    for place, x in enumerate(latents):
        for i in range(3):
            v = (1 - levels[i]) - 0.5 * x
            clean, noise = x + levels[i] * v, x - (1 - levels[i]) * v
            share = math.sin(eta * math.pi / 2)
            noise = math.sqrt(1 - share**2) * noise + share * draw(i)[place]
            x = (1 - levels[i + 1]) * clean + levels[i + 1] * noise
        torch.testing.assert_close(ends[place], x)
    assert seen == [0, 1, 2]


def test_renoise_is_its_formula_written_out():
    latents, levels = [torch.randn(4, 2, 2), torch.randn(4, 2, 6)], sigmas(3, 2.0).tolist()
    draw = fresh_noise(latents)
    ends = renoise(lambda xs, t: [t - 0.5 * x for x in xs], latents, levels, fresh_noise=draw)
    for place, x in enumerate(latents):
        for i in range(3):
            clean = x + levels[i] * ((1 - levels[i]) - 0.5 * x)
            x = (1 - levels[i + 1]) * clean + levels[i + 1] * draw(i)[place]
        torch.testing.assert_close(ends[place], x)


def test_the_state_is_float32_when_the_network_is_not():
    start = torch.randn(1, 4, 2, 2, dtype=torch.bfloat16)
    end = euler(lambda x, t: (x * 1e-3).bfloat16(), start, sigmas(50, 1.0))
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, start.float() * (1 + 1e-3 / 50) ** 50, atol=1e-5, rtol=1e-5)


def test_each_step_is_reported():
    seen = []
    euler(lambda x, t: x, torch.ones(1, 1, 1, 1), sigmas(3, 1.0), on_step=lambda i, x: seen.append((i, float(x))))
    assert [i for i, _ in seen] == [0, 1, 2]
    assert seen[-1][1] == pytest.approx((4 / 3) ** 3)
