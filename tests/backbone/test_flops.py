"""The operations that lengths promise against those that torch counts in the real network."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zimage_lit.backbone import S3DiTConfig, packing
from zimage_lit.backbone.flops import forward_flops
from zimage_lit.errors import UserError

GRIDS, CAPTIONS = [(4, 4), (5, 7), (4, 4), (8, 3)], [3, 9, 4, 17]
TOKENS = [rows * columns for rows, columns in GRIDS]


@pytest.mark.parametrize("pad_multiple", [4, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # two paths of attention on a CPU
def test_operations_of_unequal_samples_are_those_of_torch(
    twins, monkeypatch, pad_multiple: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(packing, "PAIRS_OF_A_CALL", 0)  # nothing is padded to save a call, which no formula counts
    backbone = twins.ours(pad_multiple=pad_multiple).to(dtype)
    latents, t, captions = twins.batch([(2 * rows, 2 * columns) for rows, columns in GRIDS], CAPTIONS)
    expected = forward_flops(backbone.config, TOKENS, CAPTIONS)

    with FlopCounterMode(display=False) as forward:
        velocities = backbone(latents, t, captions)
    assert forward.get_total_flops() == expected

    with FlopCounterMode(display=False) as backward:
        torch.cat([velocity.flatten() for velocity in velocities]).square().mean().backward()
    no_gradient = 2 * backbone.config.dim * 64 * sum(TOKENS) + 2 * 256 * 1024 * len(TOKENS)  # of latents and times
    fused = forward.get_flop_counts()["Global"].get(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, 0)
    again = fused // 2  # the fused kernel forms its weights anew, which is one of its two products
    counted = backward.get_total_flops()  # with a sum in each norm that a product with a vector does
    assert counted == pytest.approx(2 * expected - no_gradient + again, rel=0.005)


def test_operations_of_the_published_sizes() -> None:
    """Against the sum by hand: 30 blocks at 1024 + 128 tokens of 12 d^2 (attention 4, feed-forward 8) and the rest."""
    config = S3DiTConfig.preset("z-image-6b")
    blocks = 30 * (2 * 1152 * 12 * 3840**2 + 4 * 1152**2 * 3840)
    assert 1.05 < forward_flops(config, [1024], [128]) / blocks < 1.10  # refiners: 2 of 30 blocks over as many tokens
    assert forward_flops(config, [1024, 4096], [128, 77]) == sum(
        forward_flops(config, [image], [caption]) for image, caption in ((1024, 128), (4096, 77))
    )


def test_lengths_that_make_no_batch_are_refused() -> None:
    for images, captions in (([4], [4, 4]), ([4, 0], [4, 4]), ([4], [0])):
        with pytest.raises(UserError, match="every sample needs image and caption tokens"):
            forward_flops(S3DiTConfig.preset("tiny"), images, captions)
