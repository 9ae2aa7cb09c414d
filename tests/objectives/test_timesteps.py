import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

from zimage_lit.errors import UserError
from zimage_lit.objectives import timesteps
from zimage_lit.objectives.timesteps import RenoiseLaw, TimestepLaw, dynamic_teacher_scale
from zimage_lit.sampling import sigmas

DRAWS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def is_logit_normal_in_sigma(t: torch.Tensor, mean: float, std: float) -> float:
    """p-value of a Kolmogorov–Smirnov test of logit(1 − t) against N(mean, std²)."""
    sigma = 1 - t.double().numpy()
    return scipy.stats.kstest(scipy.special.logit(sigma), scipy.stats.norm(mean, std).cdf).pvalue


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 1.5)])
def test_logit_normal_has_its_distribution_in_sigma(mean, std):
    t = timesteps.logit_normal(DRAWS, mean, std, generator())
    assert t.dtype == torch.float32 and ((t > 0) & (t < 1)).all()
    assert is_logit_normal_in_sigma(t, mean, std) > 0.01
    assert is_logit_normal_in_sigma(t, mean + 0.1, std) < 1e-6  # the test can tell a wrong law


def test_a_positive_mean_means_more_noise():
    assert timesteps.logit_normal(DRAWS, 1.0, 1.0, generator()).mean() < 0.4


def test_uniform_is_uniform():
    t = timesteps.uniform(DRAWS, generator())
    assert scipy.stats.kstest(t.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0, 0.5])
def test_shift_equals_the_schedulers(shift):
    sigmas = np.linspace(1.0, 0.01, 100)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    shifted = 1 - timesteps.shift(torch.from_numpy(1 - sigmas), shift)
    np.testing.assert_allclose(shifted.numpy(), scheduler.sigmas[:-1].numpy(), atol=1e-6)


def test_shift_keeps_both_ends():
    ends = torch.tensor([0.0, 1.0])
    assert torch.equal(timesteps.shift(ends, 6.0), ends)


def test_resolution_shift_equals_the_dynamic_shift_of_diffusers():
    tokens = [16, 256, 1024, 3600, 4096, 9216]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="exponential")
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for count, shift in zip(tokens, timesteps.resolution_shift(tokens), strict=True):
        expected = scheduler.time_shift(calculate_shift(count), 1.0, 1 - t)
        torch.testing.assert_close(1 - timesteps.shift(t, shift.double()), expected, atol=1e-6, rtol=0)


def test_a_law_may_have_a_line_of_its_own():
    law = TimestepLaw("uniform", shift="resolution", base_tokens=9, base_shift=1.8, max_tokens=36, max_shift=2.3)
    plain = TimestepLaw("uniform").sample([9, 36, 18], generator(3))
    drawn = law.sample([9, 36, 18], generator(3))
    shifts = torch.exp(torch.tensor([1.8, 2.3, 1.8 + 0.5 * 9 / 27]))
    torch.testing.assert_close(drawn, timesteps.shift(plain, shifts))


def test_a_law_shifts_each_sample_by_its_own_resolution():
    law = TimestepLaw("uniform", shift="resolution")
    drawn = law.sample([256, 4096, 1024], generator())
    plain = timesteps.uniform(3, generator())
    for drawn_t, plain_t, tokens in zip(drawn, plain, (256, 4096, 1024), strict=True):
        torch.testing.assert_close(drawn_t, timesteps.shift(plain_t, float(timesteps.resolution_shift([tokens]))))


def test_a_law_with_a_static_shift_moves_the_logit_normal_by_log_shift():
    t = TimestepLaw("logit_normal", mean=0.3, std=0.8, shift=3.0).sample([16] * DRAWS, generator())
    assert is_logit_normal_in_sigma(t, 0.3 + np.log(3.0), 0.8) > 0.01


def test_the_same_generator_draws_the_same_times():
    law = TimestepLaw()
    assert torch.equal(law.sample([16] * 8, generator(7)), law.sample([16] * 8, generator(7)))
    assert not torch.equal(law.sample([16] * 8, generator(7)), law.sample([16] * 8, generator(8)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosine"}, "name='cosine'"),
        ({"std": 0.0}, "std must be positive"),
        ({"shift": -1.0}, "shift must be a positive number"),
        ({"shift": "dynamic"}, "'resolution', not 'dynamic'"),
        ({"base_tokens": 4096}, "base_tokens must be positive and below max_tokens, not 4096 and 4096"),
        ({"name": "grid", "num_inference_steps": 0}, "num_inference_steps must be at least 1, not 0"),
        ({"max_shift": float("inf")}, "base_shift and max_shift must be finite, not 0.5 and inf"),
    ],
)
def test_a_law_with_bad_settings_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TimestepLaw(**settings)


@pytest.mark.parametrize(("steps", "shift"), [(8, 3.0), (4, 1.0), (1, 3.0)])
def test_the_grid_law_draws_the_times_at_which_a_student_is_asked_evenly(steps, shift):
    drawn = TimestepLaw("grid", num_inference_steps=steps, shift=shift).sample([16] * DRAWS, generator())
    times, counts = drawn.unique(return_counts=True)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(times, 1 - sigmas(steps, shift)[:-1], atol=1e-6, rtol=0)
    assert steps == 1 or scipy.stats.chisquare(counts.numpy()).pvalue > 0.01


# ------------------------------------------------------------------------------------------- re-noise laws


def follows(sigma: torch.Tensor, cumulative, low: float = 0.02, high: float = 0.98) -> float:
    """The smaller p-value of two tests: sigma's distribution between the clamps, and how much lies on each of them.

    ``cumulative``: the distribution function of sigma before the clamp, a function of numpy arrays.
    """
    values = sigma.double().numpy()
    at_low, at_high = values <= low + 1e-6, values >= high - 1e-6
    below, above = cumulative(np.array(low)), cumulative(np.array(high))
    inside = values[~at_low & ~at_high]
    shape = scipy.stats.kstest(inside, lambda s: (cumulative(s) - below) / (above - below)).pvalue
    shares = [
        scipy.stats.binomtest(int(n.sum()), len(values), float(p)).pvalue
        for n, p in ((at_low, below), (at_high, 1 - above))
    ]
    return min(shape, *shares)


def unshifted(sigma, shift):
    """Undoes sigma' = s·sigma/(1 + (s − 1)·sigma)."""
    return sigma / (shift - (shift - 1) * sigma)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_uniform_law_has_its_distribution_in_sigma(shift):
    t = RenoiseLaw("uniform", shift=shift).sample(DRAWS, generator())
    assert t.shape == (DRAWS,) and t.dtype == torch.float32
    assert t.min() >= 0.02 - 1e-6 and t.max() <= 0.98 + 1e-6
    assert follows(1 - t, lambda s: unshifted(s, shift)) > 0.01
    assert follows(1 - t, lambda s: unshifted(s, shift * 1.2)) < 1e-6  # the test can tell a wrong law


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("student_sigma", [0.125, 0.5, 1.0])
def test_the_cleaner_law_is_even_before_the_shift_or_after_it(student_sigma, shifted):
    law = RenoiseLaw("cleaner", shift=3.0, shifted=shifted)
    t = law.sample(DRAWS, generator(), torch.full((DRAWS,), student_sigma))
    present = 3 * student_sigma / (1 + 2 * student_sigma)

    def cumulative(sigma):
        share = unshifted(sigma, 3.0) / student_sigma if shifted else sigma / present
        return np.clip(share, 0, 1)

    assert (1 - t).max() <= present + 1e-6
    assert follows(1 - t, cumulative) > 0.01


def test_the_cleaner_law_keeps_below_each_samples_own_level():
    student = torch.tensor([1.0, 0.75, 0.5, 0.25]).repeat(500)
    sigma = 1 - RenoiseLaw("cleaner", shift=3.0).sample(2000, generator(), student)
    present = 3 * student / (1 + 2 * student)
    assert (sigma <= present + 1e-6).all()
    for level in present.unique():
        assert sigma[present == level].max() > 0.9 * level.clamp(max=0.98)


@pytest.mark.parametrize(
    ("step", "a", "b"),
    [(0, 4.0, 1.5), (2500, 3.5606602, 1.4267767), (5000, 2.5, 1.25), (10_000, 1.0, 1.0), (10**6, 1, 1)],
)
def test_the_beta_law_anneals_from_mostly_noise_to_uniform(step, a, b):
    """At a quarter of the way the cosine has ½·(1 + √½) = 0.8536 of the start left."""
    sigma = 1 - RenoiseLaw("beta").sample(DRAWS, generator(), step=step)
    assert follows(sigma, scipy.stats.beta(a, b).cdf) > 0.01
    assert follows(sigma, scipy.stats.beta(a + 0.2, b).cdf) < 1e-6


def test_the_beta_law_starts_at_its_known_mean_and_may_be_shifted():
    law = RenoiseLaw("beta", low=0.0, high=1.0)
    assert float((1 - law.sample(DRAWS, generator())).mean()) == pytest.approx(4 / 5.5, abs=0.005)
    shifted = RenoiseLaw("beta", low=0.0, high=1.0, shift=3.0)
    torch.testing.assert_close(shifted.sample(50, generator()), timesteps.shift(law.sample(50, generator()), 3.0))
    assert torch.equal(RenoiseLaw("beta", anneal_steps=0).sample(50, generator()), RenoiseLaw().sample(50, generator()))


def test_the_same_generator_draws_the_same_levels():
    for law in (RenoiseLaw(), RenoiseLaw("cleaner"), RenoiseLaw("beta")):
        bound = torch.ones(8)
        assert torch.equal(law.sample(8, generator(7), bound, 3), law.sample(8, generator(7), bound, 3))
        assert not torch.equal(law.sample(8, generator(7), bound, 3), law.sample(8, generator(8), bound, 3))


@pytest.mark.parametrize("bound", [None, torch.ones(3)])
def test_the_cleaner_law_needs_the_students_levels(bound):
    with pytest.raises(ValueError, match=r"needs a student_sigma of shape \(4,\)"):
        RenoiseLaw("cleaner").sample(4, generator(), bound)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "noisier"}, "must be uniform, cleaner or beta, not noisier"),
        ({"low": 0.5, "high": 0.5}, "0 <= low < high <= 1, not low=0.5 and high=0.5"),
        ({"high": 1.1}, "not low=0.02 and high=1.1"),
        ({"shift": 0.0}, "shift must be positive and finite, not 0.0"),
        ({"shifted": False}, "shifted=false means nothing to the re-noise law uniform"),
        ({"name": "beta", "beta_start": (4.0, 0.0)}, "two positive numbers each"),
        ({"name": "beta", "beta_end": (1.0,)}, "two positive numbers each"),
        ({"anneal_steps": -1}, "anneal_steps must not be negative, but is -1"),
    ],
)
def test_a_renoise_law_with_bad_settings_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        RenoiseLaw(**settings)


def test_the_teacher_takes_off_the_students_adapter_along_a_cosine():
    """0.75·½·(1 + cos(π·step/9000)), whose values at thirds are exact."""
    scales = [dynamic_teacher_scale(step, steps=9000) for step in (0, 3000, 4500, 6000, 9000, 20_000)]
    assert scales == pytest.approx([0.75, 0.5625, 0.375, 0.1875, 0.0, 0.0])
    assert scales[-2:] == [0.0, 0.0]  # exactly: then the teacher is the teacher
    assert dynamic_teacher_scale(0, steps=0) == 0.0
