"""What one forward of the backbone costs, in floating-point operations, from the lengths of its samples alone.

Counted are the matrix products: every linear layer and the two products of attention, each multiply-add as 2. That is
what `torch.utils.flop_counter` counts too, and the tests hold the two equal. Not counted are norms, rotations, gates,
softmax, activations and residual sums: they are bound by memory, and no peak figure of a GPU is about them.
"""

from collections.abc import Sequence

from zimage_lit.backbone.config import S3DiTConfig
from zimage_lit.errors import UserError

TIMESTEP_SINUSOIDS, TIMESTEP_HIDDEN = 256, 1024  # widths inside `TimestepEmbedder`
# Forwards' worth of a training step: the backward of a matrix product is two products of the same size. "full"
# activation checkpointing runs the blocks, which are all but a thousandth of the network, forward once more.
FORWARDS_PER_STEP = 3
FORWARDS_PER_CHECKPOINTED_STEP = 4


def forward_flops(config: S3DiTConfig, image_tokens: Sequence[int], caption_tokens: Sequence[int]) -> int:
    """Operations of one forward over a batch; pads up to `pad_multiple` are worked on and therefore counted.

    image_tokens, caption_tokens: real tokens of each sample, B each (an image has a token for every patch of its
    latent). Raises UserError where the two differ in number or a sample has no tokens.
    """
    if len(image_tokens) != len(caption_tokens) or min([*image_tokens, *caption_tokens], default=1) < 1:
        raise UserError(
            f"every sample needs image and caption tokens, got {len(image_tokens)} images of {list(image_tokens)[:5]} "
            f"and {len(caption_tokens)} captions of {list(caption_tokens)[:5]}."
        )
    images = [padded(tokens, config.pad_multiple) for tokens in image_tokens]
    captions = [padded(tokens, config.pad_multiple) for tokens in caption_tokens]
    both = [image + caption for image, caption in zip(images, captions, strict=True)]
    patch_dim = config.patch_size**2 * config.in_channels
    embedding = 2 * config.dim * (patch_dim * sum(image_tokens) + config.cap_feat_dim * sum(caption_tokens))
    timestep = TIMESTEP_SINUSOIDS * TIMESTEP_HIDDEN + TIMESTEP_HIDDEN * config.modulation_dim
    final_layer = config.dim * (patch_dim * sum(images) + config.modulation_dim * len(images))
    return (
        embedding
        + 2 * timestep * len(images)
        + config.n_refiner_layers * (block_flops(config, images, True) + block_flops(config, captions, False))
        + config.n_layers * block_flops(config, both, True)
        + 2 * final_layer
    )


def block_flops(config: S3DiTConfig, lengths: Sequence[int], modulated: bool) -> int:
    """Operations of one block's forward over samples of these padded lengths."""
    per_token = 4 * config.dim**2 + 3 * config.dim * config.ffn_dim
    attention = 2 * config.dim * sum(length**2 for length in lengths)
    modulation = 4 * config.dim * config.modulation_dim * len(lengths) if modulated else 0
    return 2 * (per_token * sum(lengths) + attention + modulation)


def padded(tokens: int, multiple: int) -> int:
    """The next multiple of `multiple` that holds `tokens`."""
    return -(-tokens // multiple) * multiple
