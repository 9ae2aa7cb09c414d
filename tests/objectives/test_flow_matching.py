import pytest
import torch

from zimage_lit.objectives import flow_matching

SHAPES = [(16, 8, 8), (16, 4, 12), (4, 2, 2)]


def draw(shapes: list[tuple[int, ...]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_the_path_starts_at_noise_and_ends_at_data_exactly():
    noise, data = draw(SHAPES, 0), draw(SHAPES, 1)
    for t, expected in ((0.0, noise), (1.0, data)):
        points = flow_matching.interpolate(noise, data, torch.full((3,), t))
        assert all(torch.equal(point, want) for point, want in zip(points, expected, strict=True))


def test_the_path_is_straight_and_its_derivative_is_the_target():
    noise, data = torch.randn(4, 16, 6, 10), torch.randn(4, 16, 6, 10)
    t = torch.rand(4)
    _, slope = torch.func.jvp(lambda time: flow_matching.interpolate(noise, data, time), (t,), (torch.ones(4),))
    torch.testing.assert_close(slope, flow_matching.target_velocity(noise, data))


def test_the_true_velocity_points_from_anywhere_on_the_path_to_the_data():
    noise, data, t = draw(SHAPES, 0), draw(SHAPES, 1), torch.tensor([0.1, 0.5, 0.9])
    latents = flow_matching.interpolate(noise, data, t)
    clean = flow_matching.clean_from_velocity(latents, flow_matching.target_velocity(noise, data), t)
    for got, want in zip(clean, data, strict=True):
        torch.testing.assert_close(got, want)


def test_lists_and_tensors_agree():
    noise, data, t = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6), torch.rand(3)
    for name, args in {
        "interpolate": (noise, data, t),
        "clean_from_velocity": (noise, data, t),
        "target_velocity": (noise, data),
        "loss": (noise, data),
    }.items():
        function = getattr(flow_matching, name)
        as_lists = function(*(list(x) if x.ndim == 4 else x for x in args))
        as_lists = as_lists if isinstance(as_lists, torch.Tensor) else torch.stack(as_lists)
        torch.testing.assert_close(as_lists, function(*args))


def test_loss_is_the_mean_over_each_samples_own_elements():
    predicted, target = draw(SHAPES, 2), draw(SHAPES, 3)
    losses = flow_matching.loss(predicted, target)
    brute_force = [float(((p - q) ** 2).sum()) / p.numel() for p, q in zip(predicted, target, strict=True)]
    assert losses.shape == (3,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.tensor(brute_force))


def test_loss_does_not_depend_on_how_large_a_picture_is():
    big, small = torch.full((16, 64, 64), 0.5), torch.full((16, 2, 2), 0.5)
    losses = flow_matching.loss([big, small], [torch.zeros_like(big), torch.zeros_like(small)])
    torch.testing.assert_close(losses, torch.tensor([0.25, 0.25]))


def test_gradient_of_the_loss_is_the_analytic_one():
    predicted = [x.requires_grad_() for x in draw(SHAPES, 4)]
    target, weights = draw(SHAPES, 5), torch.tensor([1.0, 2.0, 0.5])
    (weights * flow_matching.loss(predicted, target)).sum().backward()
    for p, q, weight in zip(predicted, target, weights, strict=True):
        torch.testing.assert_close(p.grad, weight * 2 * (p.detach() - q) / p.numel())


def test_loss_of_bfloat16_predictions_is_taken_in_float32():
    target = draw(SHAPES, 6)
    predicted = [x.bfloat16() for x in target]
    losses = flow_matching.loss(predicted, target)
    expected = torch.stack([(p.float() - q).square().mean() for p, q in zip(predicted, target, strict=True)])
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(
    ("noise", "data", "t", "message"),
    [
        (draw(SHAPES, 0), draw(SHAPES[:2], 1), torch.rand(3), "3 and 2 samples"),
        (draw(SHAPES, 0), draw(SHAPES[::-1], 1), torch.rand(3), "Sample 0 has shape"),
        (draw(SHAPES, 0), draw(SHAPES, 1), torch.rand(2), r"shape \(3,\)"),
        (torch.rand(1, 2, 2, 2), [torch.rand(2, 2, 2)], torch.rand(1), "not one of each"),
    ],
)
def test_batches_that_do_not_belong_together_are_refused(noise, data, t, message):
    with pytest.raises(ValueError, match=message):
        flow_matching.interpolate(noise, data, t)
