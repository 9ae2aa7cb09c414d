import numpy as np
import pytest
import scipy.stats
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

from zimage_lit.objectives import timesteps
from zimage_lit.objectives.timesteps import TimestepLaw

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
        ({"max_shift": float("inf")}, "base_shift and max_shift must be finite, not 0.5 and inf"),
    ],
)
def test_a_law_with_bad_settings_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TimestepLaw(**settings)
