"""What a forward of the backbone and a training step cost, in floating-point operations, from samples' lengths alone.

Counted are the matrix products: every linear layer and the two products of attention, each multiply-add as 2. That is
what `torch.utils.flop_counter` counts too, and the tests hold the two equal. Not counted are norms, rotations, gates,
softmax, activations and residual sums: they are bound by memory, and no peak figure of a GPU is about them.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from zimage_lit.backbone.config import S3DiTConfig
from zimage_lit.errors import UserError

if TYPE_CHECKING:
    from zimage_lit.backbone.model import S3DiT

TIMESTEP_SINUSOIDS, TIMESTEP_HIDDEN = 256, 1024  # widths inside `TimestepEmbedder`


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
    images, captions, both = lengths(config, image_tokens, caption_tokens)
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
    modulation = 4 * config.dim * config.modulation_dim * len(lengths) if modulated else 0
    return 2 * (per_token * sum(lengths) + modulation) + attention_flops(config, lengths)


def attention_flops(config: S3DiTConfig, lengths: Sequence[int]) -> int:
    """Operations of the two products of attention in one block's forward over samples of these padded lengths."""
    return 4 * config.dim * sum(length**2 for length in lengths)


class TrainingWork:
    """Operations of a training step, from the network as it is trained: whole, or frozen with LoRA.

    A matrix costs 2 operations an element and token in the forward, as much for the gradient of its input, and as much
    again for its own if it is trained; attention, which has no weights, three forwards' worth. Where nothing is frozen
    that is three times `forward_flops`.

    again: every block's forward is computed once more in the backward pass.
    """

    def __init__(self, network: "S3DiT", again: bool = False) -> None:
        self.config, self.again = network.config, again
        self.sizes: Counter[str] = Counter()  # elements of the matrices that see the same tokens
        self.trained: Counter[str] = Counter()  # those of them that are trained
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 and not name.endswith("pad_token"):
                self.sizes[tokens_seen(name)] += parameter.numel()
                self.trained[tokens_seen(name)] += parameter.numel() * parameter.requires_grad

    def flops(self, image_tokens: Sequence[int], caption_tokens: Sequence[int]) -> tuple[int, int]:
        """(the model's own, those executed) of one training step over these samples."""
        config = self.config
        images, captions, both = lengths(config, image_tokens, caption_tokens)
        tokens = {
            "samples": len(image_tokens),
            "real images": sum(image_tokens),
            "real captions": sum(caption_tokens),
            "images": sum(images),
            "captions": sum(captions),
            "both": sum(both),
        }
        forward = sum(2 * size * tokens[seen] for seen, size in self.sizes.items())
        own_gradients = sum(2 * size * tokens[seen] for seen, size in self.trained.items())
        attention = config.n_refiner_layers * attention_flops(config, [*images, *captions])
        attention += config.n_layers * attention_flops(config, both)
        model = 2 * forward + own_gradients + 3 * attention
        return model, model + (forward + attention if self.again else 0)


def tokens_seen(name: str) -> str:
    """Which tokens pass through the matrix of this name, be it one of LoRA's."""
    if "adaLN_modulation" in name or name.startswith("t_embedder"):
        return "samples"
    places = {
        "all_x_embedder": "real images",
        "cap_embedder": "real captions",
        "noise_refiner": "images",
        "all_final_layer": "images",
        "context_refiner": "captions",
    }
    return places.get(name.partition(".")[0], "both")


def lengths(
    config: S3DiTConfig, image_tokens: Sequence[int], caption_tokens: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Padded lengths of each sample's image, caption and both together."""
    images = [padded(tokens, config.pad_multiple) for tokens in image_tokens]
    captions = [padded(tokens, config.pad_multiple) for tokens in caption_tokens]
    return images, captions, [image + caption for image, caption in zip(images, captions, strict=True)]


def padded(tokens: int, multiple: int) -> int:
    """The next multiple of `multiple` that holds `tokens`."""
    return -(-tokens // multiple) * multiple
