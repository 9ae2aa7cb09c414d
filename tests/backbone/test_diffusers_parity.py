"""Our network and diffusers' ZImageTransformer2DModel compute the same function of the same weights."""

import pytest
import torch
from diffusers.models.transformers import transformer_z_image
from torch import Tensor

from zimage_lit.backbone import S3DiTConfig

BATCHES = {
    "one, nothing padded": ([(16, 8)], [32]),
    "one, both padded": ([(10, 6)], [5]),
    "one, a single token each": ([(2, 2)], [1]),
    "four alike": ([(8, 8)] * 4, [20] * 4),
    "four alike in size, captions unequal": ([(12, 12)] * 4, [5, 40, 32, 70]),
    "squares and rectangles": ([(8, 8), (12, 20), (20, 12), (16, 4)], [33, 64, 64, 12]),
    "equal sums of unequal parts": ([(16, 8), (16, 16), (10, 6), (16, 8)], [64, 20, 40, 33]),
    "odd grids": ([(10, 6), (6, 10), (14, 2), (22, 14)], [1, 31, 32, 33]),
}


def compare(twins, sizes: dict, latents: list[Tensor], t: Tensor, captions: list[Tensor]) -> None:
    """Outputs within 1e-5, every gradient (parameters, latents, captions) within 1e-4, relative, and none trivial."""
    ours, theirs = twins.both(**sizes)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(latent.shape, generator=generator) for latent in latents]
    results = []
    for run in (ours, lambda *inputs: twins.run_theirs(theirs, *inputs)):
        inputs = [x.clone().requires_grad_() for x in [*latents, *captions]]
        outputs = run(inputs[: len(latents)], t, inputs[len(latents) :])
        sum((weight * output).sum() for weight, output in zip(weights, outputs, strict=True)).backward()
        results.append((outputs, [x.grad for x in inputs]))
    (our_outputs, our_inputs), (their_outputs, their_inputs) = results

    for latent, actual, expected in zip(latents, our_outputs, their_outputs, strict=True):
        assert actual.shape == latent.shape
        assert expected.std() > 0.1
        assert twins.error(actual, expected) <= 1e-5
    for actual, expected in zip(our_inputs, their_inputs, strict=True):
        assert expected.norm() > 0
        assert twins.error(actual, expected) <= 1e-4
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert gradients[name].norm() > 0 or name.endswith("pad_token"), name
        assert twins.error(parameter.grad, gradients[name]) <= 1e-4, name


@pytest.mark.parametrize("batch", BATCHES)
def test_forward_and_every_gradient_equal_diffusers(twins, batch: str) -> None:
    compare(twins, twins.SMALL, *twins.batch(*BATCHES[batch]))


@pytest.mark.parametrize("batch", ["one, both padded", "squares and rectangles"])
def test_parity_holds_at_the_published_head_size(twins, batch: str) -> None:
    compare(twins, twins.WIDE, *twins.batch(*BATCHES[batch], features=80))


def test_tiny_preset_equals_diffusers_once_that_pads_alike(twins, monkeypatch: pytest.MonkeyPatch) -> None:
    config = S3DiTConfig.preset("tiny")
    monkeypatch.setattr(transformer_z_image, "SEQ_MULTI_OF", config.pad_multiple)
    ours = twins.ours(**vars(config))
    theirs = twins.theirs(**{key: value for key, value in vars(config).items() if key != "pad_multiple"})
    theirs.load_state_dict(ours.state_dict())
    batch = twins.batch([(8, 8), (10, 6), (8, 8), (12, 4)], [3, 8, 30, 17], features=config.cap_feat_dim)
    with torch.no_grad():
        for actual, expected in zip(ours(*batch), twins.run_theirs(theirs, *batch), strict=True):
            assert twins.error(actual, expected) <= 1e-5
