"""What must hold of S3-DiT by itself: golden numbers, presets, independence of batch mates, precision, bad input."""

import random

import pytest
import torch
from diffusers import ZImageTransformer2DModel

from zimage_lit.backbone import S3DiT, S3DiTConfig
from zimage_lit.backbone.model import patchify, sinusoids
from zimage_lit.backbone.rope import rotate, rotation_tables, rotations
from zimage_lit.errors import UserError

CPU = torch.device("cpu")
PUBLISHED_TABLES = ((32, 48, 48), (1536, 512, 512), 256.0)


def test_timestep_sinusoids_are_the_published_ones() -> None:
    (embedding,) = sinusoids(torch.tensor([357.142857]), 256)
    torch.testing.assert_close(
        embedding[[0, 1, 2, 3, 128, 129, 130, 131]],
        torch.tensor([0.5413876, 0.7889587, 0.1730516, 0.3382470, -0.8407732, -0.6144462, 0.9849128, -0.9410574]),
        rtol=0,
        atol=2e-6,
    )


def test_rotary_angles_are_the_published_ones() -> None:
    (rotation,) = rotations(torch.tensor([[65, 3, 7]]), rotation_tables(*PUBLISHED_TABLES, CPU))
    assert rotation.shape == (64,)
    expected = [2.1681471, 1.9796436, 1.0840734, -2.1517708, 3.0, 2.3811016, 1.8898816, 1.5]
    expected += [0.7168147, -0.7272814, -1.8734615, -2.7831852]
    angles = torch.cat([rotation[start : start + 4].angle() for start in (0, 16, 40)])
    torch.testing.assert_close(angles, torch.tensor(expected), rtol=0, atol=1e-5)


def test_rotation_turns_neighbouring_pairs_by_the_angle() -> None:
    angle = torch.tensor([0.3, -1.2])
    turned = rotate(torch.tensor([[[1.0, 0.0, 0.0, 2.0]]]), torch.polar(torch.ones(2), angle)[None])
    expected = torch.stack([angle[0].cos(), angle[0].sin(), -2 * angle[1].sin(), 2 * angle[1].cos()])
    torch.testing.assert_close(turned[0, 0], expected)


def test_patches_run_row_by_row_with_the_channel_fastest(twins) -> None:
    patches = patchify([torch.arange(16.0 * 4 * 6).view(16, 4, 6)], 2)
    assert patches.shape == (6, 64)
    assert patches[0, [0, 1, 2, 3, 16, 32, 48]].tolist() == [0, 24, 48, 72, 1, 6, 7]
    assert patches[:, 0].tolist() == [0, 2, 4, 12, 14, 16]


def test_unpatchify_inverts_patchify_in_the_callers_order(twins) -> None:
    model = twins.ours()
    latents, _, captions = twins.batch([(8, 8), (4, 12), (10, 6), (4, 4)], [5, 40, 1, 33])
    packing = model.plan(latents, torch.zeros(len(latents)), captions)
    in_order = [latents[i] for i in packing.order]
    back = model.unpatchify(patchify(in_order, 2), [latent.shape for latent in in_order], packing)
    assert all(torch.equal(a, b) for a, b in zip(back, latents, strict=True))


def test_published_preset_has_the_published_tensors() -> None:
    with torch.device("meta"):
        ours, theirs = S3DiT(S3DiTConfig.preset("z-image-6b")), ZImageTransformer2DModel()
    tensors = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert len(tensors) == 521
    assert sum(shape.numel() for shape in tensors.values()) == 6_154_908_736
    assert tensors == {name: tensor.shape for name, tensor in theirs.state_dict().items()}


def test_presets_build_and_unknown_ones_are_refused() -> None:
    with torch.device("meta"):
        tiny = S3DiT(S3DiTConfig.preset("tiny"))
    assert sum(parameter.numel() for parameter in tiny.parameters()) < 10_000_000
    with pytest.raises(UserError, match=r"'huge'.*tiny, z-image-6b"):
        S3DiTConfig.preset("huge")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes_dims": [4, 4, 6]}, "axes_dims"),
        ({"axes_dims": [3, 7, 6]}, "even"),
        ({"n_heads": 5}, "head size"),
        ({"n_kv_heads": 2}, "n_kv_heads"),
        ({"qk_norm": False}, "qk_norm"),
        ({"all_patch_size": [2, 4]}, "all_patch_size"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim"),
    ],
)
def test_sizes_that_the_architecture_lacks_are_refused(twins, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        S3DiTConfig(**{**twins.SMALL, **change})


UNEQUAL = ([(8, 8), (12, 20), (20, 12), (10, 6)], [33, 64, 5, 12])


def test_a_sample_alone_equals_itself_among_unequal_mates(twins) -> None:
    model = twins.ours()
    latents, t, captions = twins.batch(*UNEQUAL)
    with torch.no_grad():
        together = model(latents, t, captions)
        for i, output in enumerate(together):
            (alone,) = model([latents[i]], t[i : i + 1], [captions[i]])
            assert twins.error(output, alone) <= 1e-6


def test_changing_one_sample_leaves_the_others_bit_identical(twins) -> None:
    model = twins.ours()
    latents, t, captions = twins.batch(*UNEQUAL)
    with torch.no_grad():
        before = model(latents, t, captions)
        latents[1], captions[1], t[1] = latents[1] + 1, captions[1] * 2, 1 - t[1]
        after = model(latents, t, captions)
    assert not torch.equal(before[1], after[1])
    assert all(torch.equal(before[i], after[i]) for i in (0, 2, 3))


def test_gradient_of_one_sample_reaches_no_other(twins) -> None:
    latents, t, captions = twins.batch(*UNEQUAL)
    inputs = [x.requires_grad_() for x in [*latents, *captions]]
    twins.ours()(latents, t, captions)[2].square().sum().backward()
    reached = [bool(x.grad is not None and x.grad.any()) for x in inputs]
    assert reached == [False, False, True, False] * 2


def test_outputs_follow_the_order_of_the_batch(twins) -> None:
    model = twins.ours()
    latents, t, captions = twins.batch(*UNEQUAL)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        outputs = model(latents, t, captions)
        shuffled = model([latents[i] for i in order], t[order], [captions[i] for i in order])
    assert all(torch.equal(shuffled[place], outputs[i]) for place, i in enumerate(order))


@pytest.mark.parametrize("token", ["cap_pad_token", "x_pad_token"])
def test_pad_tokens_are_attended_where_a_length_is_not_a_multiple_of_32(twins, token: str) -> None:
    model = twins.ours()
    padded, full = twins.batch([(10, 6)], [20]), twins.batch([(16, 8)], [32])
    with torch.no_grad():
        before = [model(*batch)[0] for batch in (padded, full)]
        getattr(model, token).add_(torch.linspace(-2, 2, model.config.dim))
        after = [model(*batch)[0] for batch in (padded, full)]
    assert twins.error(after[0], before[0]) > 1e-2
    assert torch.equal(after[1], before[1])


def test_bfloat16_weights_stay_close_to_float32(twins) -> None:
    model = twins.ours()
    latents, t, captions = twins.batch(*UNEQUAL)
    with torch.no_grad():
        exact = model(latents, t, captions)
        rounded = model.bfloat16()(latents, t, captions)
    for actual, expected in zip(rounded, exact, strict=True):
        assert actual.dtype == torch.float32
        assert 1e-5 < twins.error(actual, expected) < 0.05


def test_autocast_stays_close_to_float32_forward_and_backward(twins) -> None:
    latents, t, captions = twins.batch(*UNEQUAL)
    gradients = []
    for enabled in (False, True):
        model = twins.ours()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            outputs = model(latents, t, captions)
        sum(output.square().sum() for output in outputs).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, exact in gradients[0].items():
        assert gradients[1][name].isfinite().all()
        assert twins.error(gradients[1][name], exact) < 0.2, name


def test_sampling_before_training_does_not_spoil_the_gradients(twins) -> None:
    """Tables that were made in inference mode must not be caught in a later backward pass."""
    model = twins.ours(rope_theta=250.0)
    batch = twins.batch(*UNEQUAL)
    with torch.inference_mode():
        model(*batch)
    sum(output.sum() for output in model(*batch)).backward()
    assert model.x_pad_token.grad is not None


@pytest.mark.parametrize(
    ("size", "features", "message"),
    [
        ((15, 8, 8), (4, 48), "16 channels"),
        ((16, 7, 8), (4, 48), "divisible by 2"),
        ((16, 8, 8), (4, 40), "cap_feat_dim 48"),
        ((16, 8, 8), (0, 48), "at least one token"),
        ((16, 1026, 8), (4, 48), "axes_lens"),
        ((16, 8, 8), (1505, 48), "axes_lens"),
    ],
)
def test_inputs_of_a_wrong_shape_are_refused_in_a_sentence(twins, size: tuple, features: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        twins.ours()([torch.zeros(size)], torch.zeros(1), [torch.zeros(features)])


def test_the_longest_caption_and_the_largest_side_that_fit_are_accepted(twins) -> None:
    model = twins.ours(n_layers=1, n_refiner_layers=1)
    with torch.no_grad():
        (output,) = model([torch.ones(16, 2, 1024)], torch.ones(1), [torch.ones(1504, 48)])
    assert output.isfinite().all()


def test_every_part_of_a_fresh_network_learns() -> None:
    torch.manual_seed(0)
    model = S3DiT(S3DiTConfig.preset("tiny"))
    (output,) = model([torch.randn(16, 6, 10)], torch.rand(1), [torch.randn(9, model.config.cap_feat_dim)])
    assert output.isfinite().all()
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def waves(shape: torch.Size, phase: float) -> torch.Tensor:
    """Numbers that need no random generator: a wave of irrational step."""
    steps = torch.arange(shape.numel(), dtype=torch.float64)
    return torch.sin(steps * 1.618033988749895 + phase).to(torch.float32).view(shape)


# Computed in float64 by this code once it agreed with diffusers: loss, norm of all gradients, three output values.
RECORDED = [1.7706955, 256.6563026, 0.6568445, 1.5595581, 1.8008808]


def test_a_network_of_known_weights_repeats_its_recorded_loss_and_gradient() -> None:
    """A silent change of the network shows here even if the reference library changes in the same way."""
    sizes = {"dim": 96, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [8, 8, 8]}
    model = S3DiT(S3DiTConfig(**sizes, cap_feat_dim=48, pad_multiple=8))
    with torch.no_grad():
        for phase, (_, parameter) in enumerate(sorted(model.named_parameters())):
            wave = waves(parameter.shape, phase)
            parameter.copy_(wave * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.6 + 0.3 * wave)
    latents = [waves(torch.Size((16, *size)), 0.1 * i) for i, size in enumerate([(8, 8), (6, 10), (8, 8)])]
    captions = [waves(torch.Size((length, 48)), 0.2 * i) for i, length in enumerate([7, 16, 30])]
    outputs = model(latents, torch.tensor([0.1, 0.5, 0.9]), captions)
    loss = sum((output - latent).square().mean() for output, latent in zip(outputs, latents, strict=True)) / 3
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    seen = [loss.item(), norm.item(), *outputs[1].flatten()[[0, 100, 500]].tolist()]
    assert seen == pytest.approx(RECORDED, rel=1e-4)


def test_gradients_repeat_bit_for_bit_on_two_threads() -> None:
    torch.manual_seed(0)
    model = S3DiT(S3DiTConfig.preset("tiny"))
    draw = random.Random(0)
    latents = [torch.randn(16, 8, 8) for _ in range(64)]
    captions = [torch.randn(draw.randint(5, 11), 128) for _ in latents]
    times = torch.rand(len(latents))

    def gradients() -> list[torch.Tensor]:
        loss = torch.stack(model(latents, times, captions)).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = gradients()
        assert all(all(map(torch.equal, first, gradients())) for _ in range(4))
    finally:
        torch.set_num_threads(threads)
