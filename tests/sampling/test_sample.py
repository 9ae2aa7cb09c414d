import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from zimage_lit.errors import UserError
from zimage_lit.sampling import LARGEST_SEED, noises, sample, sigmas


def backbone(latents, t, captions):
    """Stands in for the network: a velocity that depends on everything a sample has, and on nothing else."""
    return [c.mean() - x + t_i * x.flip(-1) for x, t_i, c in zip(latents, t, captions, strict=True)]


CAPTIONS = [torch.full((n, 2), float(n)) for n in (1, 2, 3)]


def test_noise_depends_on_the_seed_and_the_shape_alone():
    together = noises([5, 6, 5], [(4, 2, 2), (4, 2, 4), (4, 2, 2)])
    assert torch.equal(together[0], together[2]) and torch.equal(together[1], noises([6], (4, 2, 4))[0])
    assert not torch.equal(together[0], noises([6], (4, 2, 2))[0])


def test_noise_equals_that_of_diffusers_for_the_same_seeds():
    generators = [torch.Generator().manual_seed(seed) for seed in (42, 43)]
    theirs = randn_tensor((2, 16, 8, 8), generator=generators, dtype=torch.float32)
    assert torch.equal(torch.stack(noises([42, 43], (16, 8, 8))), theirs)


def test_draws_are_what_one_generator_gives_one_after_the_other():
    source = torch.Generator().manual_seed(42)
    expected = [randn_tensor((16, 6, 6), generator=source) for _ in range(4)]
    drawn = noises([42] * 4, (16, 6, 6), draws=[0, 1, 2, 3])
    assert all(torch.equal(one, other) for one, other in zip(drawn, expected, strict=True))
    assert torch.equal(noises([42], (16, 6, 6), draws=[2])[0], expected[2])
    with pytest.raises(UserError, match="draw must be 0 or more, not -1"):
        noises([42], (4, 2, 2), draws=[-1])


@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1, 10**20])
def test_seeds_that_torch_does_not_take_are_refused(seed):
    assert len(noises([0, LARGEST_SEED], (4, 2, 2))) == 2
    with pytest.raises(UserError, match=f"seed must lie between 0 and {LARGEST_SEED}, not {seed}"):
        noises([0, seed], (4, 2, 2))


def test_a_sample_does_not_depend_on_its_batch():
    settings = {"num_inference_steps": 4, "shift": 3.0, "guidance_scale": 2.0}
    starts = noises([1, 2, 3], [(4, 2, 2), (4, 2, 4), (4, 6, 2)])
    together = sample(backbone, CAPTIONS, starts, negative_captions=CAPTIONS[::-1], **settings)
    for i, latents in enumerate(together):
        alone = sample(backbone, [CAPTIONS[i]], [starts[i]], negative_captions=[CAPTIONS[2 - i]], **settings)
        assert torch.equal(latents, alone[0])


@pytest.mark.parametrize("solver", [{"solver": "cps", "eta": 0.5}, {"solver": "renoise"}])
def test_noise_drawn_anew_belongs_to_the_sample_and_not_to_its_batch(solver):
    starts = noises([1, 2, 3], [(4, 2, 2), (4, 2, 4), (4, 6, 2)])
    settings = {"num_inference_steps": 4, **solver}
    together = sample(backbone, CAPTIONS, starts, seeds=[1, 2, 3], **settings)
    for i, latents in enumerate(together):
        assert torch.equal(latents, sample(backbone, [CAPTIONS[i]], [starts[i]], seeds=[i + 1], **settings)[0])
    other = sample(backbone, CAPTIONS, starts, seeds=[1, 2, 4], **settings)
    assert torch.equal(other[0], together[0]) and not torch.equal(other[2], together[2])
    second = sample(backbone, CAPTIONS, starts, seeds=[1, 2, 3], draws=[0, 0, 1], **settings)
    assert torch.equal(second[1], together[1]) and not torch.equal(second[2], together[2])
    with pytest.raises(ValueError, match=f"{solver['solver']} needs the seed of each of 3 samples"):
        sample(backbone, CAPTIONS, starts, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "rk4"}, "solver must be one of euler, heun, cps, renoise, not rk4"),
        ({"solver": "cps", "eta": 1.5}, r"eta must lie in \[0, 1\]"),
        ({"solver": "heun", "eta": 0.5}, "eta=0.5 means nothing to the solver heun"),
        ({"solver": "renoise", "eta": 1.0}, "eta=1.0 means nothing to the solver renoise"),
    ],
)
def test_a_solver_that_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        sample(backbone, CAPTIONS[:1], noises([0], (4, 2, 2)), num_inference_steps=2, **settings)


def test_the_sampling_loop_is_euler_over_the_shifted_schedule():
    (start,) = noises([0], (4, 2, 2))
    x, levels = start.clone(), sigmas(3, 6.0)
    for i in range(3):
        t = 1 - levels[i]
        x = x + (levels[i] - levels[i + 1]) * (1.0 - x + t * x.flip(-1))
    (end,) = sample(backbone, CAPTIONS[:1], [start], num_inference_steps=3, shift=6.0)
    torch.testing.assert_close(end, x)


def test_no_graph_is_kept():
    weight = torch.ones((), requires_grad=True)
    (end,) = sample(
        lambda xs, t, c: [weight * x for x in xs], CAPTIONS[:1], noises([0], (4, 2, 2)), num_inference_steps=2
    )
    assert not end.requires_grad


@pytest.mark.parametrize(
    ("captions", "settings", "message"),
    [(CAPTIONS, {}, "3 captions were given for 1 noises"), (CAPTIONS[:2], {}, "2 captions were given for 1 noises")],
)
def test_wrong_calls_are_refused(captions, settings, message):
    with pytest.raises(ValueError, match=message):
        sample(backbone, captions, noises([0], (4, 2, 2)), num_inference_steps=2, **settings)
