"""How many bytes the backbone keeps between its forward and its backward pass, from the lengths of its samples alone.

The largest part is what each block keeps, and that can be read off `Block.forward`, line by line; d is the width of the
network, f that of the feed-forward, a row of the table one tensor that somebody's backward needs:

    attention_norm1(x)                  x: d                                 on a GPU also the normalised x: d
    to_q, to_k, to_v                    their common input: d
    norm_q, norm_k                      queries and keys as they come: 2 d   on a GPU also normalised: 2 d
    packed_attention                    turned queries and keys, values: 3 d
    to_out                              what attention gave, its input: d    on a CPU, lengths that differ: d again
    attention_norm2                     its input: d                         on a GPU also normalised: d
    ffn_norm1(x)                        x: d                                 on a GPU also normalised: d
    w1, w3                              their common input: d
    silu(w1) * w3, w2                   both factors, w1 before silu, their product: 4 f
    ffn_norm2                           its input: d                         on a GPU also normalised: d

That is 18 d + 4 f a token on a GPU, where torch's fused norm and the product with its scale each keep their input, and
12 d + 4 f on a CPU, where the norm is a function of our own. Small beside these: a float32 number a row and norm, one a
head for attention, and eight rows of d a chunk for the modulation. The plain attention of a CPU in bfloat16 also keeps
its weights, heads * length^2 a sample.

Frozen weights (LoRA) need no inputs, so what only a weight's gradient reads is not kept; each adapter keeps its own
copy of its input. With "selective" checkpointing a block keeps its input and the results of products and of attention,
with "full" its input alone; the rest is there for one block at a time, while it is computed again.

All of this is for eager blocks. Compiled ones keep less, for the compiler too computes cheap things again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zimage_lit.backbone.config import S3DiTConfig
from zimage_lit.backbone.flops import lengths

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Keeping:
    """What decides how much a block keeps."""

    width: int = 2  # bytes of an activation: 2 in bfloat16, 4 in float32
    autocast: bool = True  # float32 weights, cast for each product
    on_gpu: bool = True
    checkpointing: Literal["none", "selective", "full"] = "none"
    adapters: "Adapters | None" = None  # LoRA over frozen weights; None: all weights are trained

    @property
    def adapter_width(self) -> int:
        """Bytes of an activation inside of an adapter; adapters are float32 whatever the frozen weights are."""
        return self.width if self.autocast else FLOAT32


@dataclass(frozen=True)
class Adapters:
    """LoRA, as far as memory is concerned."""

    rank: int
    targets: frozenset[str]  # of to_q, to_k, to_v, to_out.0, w1, w2, w3
    refiners: bool = False  # also in the refiner blocks
    dora: bool = False
    dropout: bool = False


def activation_bytes(
    config: S3DiTConfig, image_tokens: Sequence[int], caption_tokens: Sequence[int], keeping: Keeping
) -> int:
    """What lies between forward and backward of one batch; image_tokens, caption_tokens: real ones of each sample."""
    images, captions, both = lengths(config, image_tokens, caption_tokens)
    # Before the first adapter nothing needs a gradient.
    refiners = config.n_refiner_layers if keeping.adapters is None or keeping.adapters.refiners else 0
    return (
        refiners * (block_bytes(config, images, True, keeping) + block_bytes(config, captions, False, keeping))
        + config.n_layers * block_bytes(config, both, True, keeping)
        + outer_bytes(config, images, captions, keeping)
    )


def working_bytes(
    config: S3DiTConfig, image_tokens: Sequence[int], caption_tokens: Sequence[int], keeping: Keeping
) -> int:
    """What the backward of one block needs beside what is kept: its recomputed tensors, and gradients on their way.

    The gradients are most at the feed-forward: three of width f (the product, the gate, one factor) and two of width d.
    """
    _, _, both = lengths(config, image_tokens, caption_tokens)
    everything = Keeping(keeping.width, keeping.autocast, keeping.on_gpu, "none", keeping.adapters)
    again = block_bytes(config, both, True, everything) - block_bytes(config, both, True, keeping)
    return again + sum(both) * (3 * config.ffn_dim + 2 * config.dim) * keeping.width


def block_bytes(config: S3DiTConfig, samples: Sequence[int], modulated: bool, keeping: Keeping) -> int:
    """What one block keeps of samples of these padded lengths."""
    tokens, d, f = sum(samples), config.dim, config.ffn_dim
    adapters = keeping.adapters
    if keeping.checkpointing == "full":
        return tokens * d * keeping.width
    plain_attention = not keeping.on_gpu and keeping.width == 2
    scores = config.n_heads * sum(length**2 for length in samples) * keeping.width if plain_attention else 0
    norm_rows = tokens * config.n_heads * FLOAT32  # a number a row and head
    if keeping.checkpointing == "selective":
        kept = 7 * d + 2 * f  # the input; q, k, v, attention, to_out; w1, w3; w2
        results = sum(adapters.rank + adapted_sizes(config, name)[1] for name in adapters.targets) if adapters else 0
        return tokens * (kept * keeping.width + results * keeping.adapter_width) + norm_rows + scores
    inputs, products = 4 * d, 4 * f  # of the four norms; of the feed-forward
    attention = 2 * d + 3 * d + d  # q and k before their norms; q, k, v; their result
    several_lengths = len(set(samples)) > 1 and not keeping.on_gpu and not plain_attention
    kept = inputs + products + attention + (d if several_lengths else 0)
    own_copies = 0
    if adapters is None:
        kept += 2 * d + (6 * d if keeping.on_gpu else 0)
    else:
        kept -= f
        own_copies = tokens * sum(adapter_bytes(config, target, keeping) for target in adapters.targets)
    chunks = tokens // config.pad_multiple if modulated else 0
    factors = chunks * d * 4 * (keeping.width + (FLOAT32 if not keeping.on_gpu else keeping.width))
    return tokens * kept * keeping.width + 3 * norm_rows + factors + scores + own_copies


def adapter_bytes(config: S3DiTConfig, target: str, keeping: Keeping) -> int:
    """What one adapter keeps a token: its input, in the type it computes in, and its narrow inner result."""
    assert keeping.adapters is not None
    before, after = adapted_sizes(config, target)
    kept = (before + keeping.adapters.rank) * keeping.adapter_width
    if keeping.adapters.dropout:
        kept += before * (1 if keeping.on_gpu else FLOAT32)  # which inputs are hidden
    if keeping.adapters.dora:
        kept += after * (keeping.width + keeping.adapter_width)  # what the base gives, and what the adapter adds
    return kept


def adapted_sizes(config: S3DiTConfig, target: str) -> tuple[int, int]:
    """(in, out) of one of a block's matrices."""
    d, f = config.dim, config.ffn_dim
    return {"w1": (d, f), "w3": (d, f), "w2": (f, d)}.get(target, (d, d))


def outer_bytes(config: S3DiTConfig, images: Sequence[int], captions: Sequence[int], keeping: Keeping) -> int:
    """What lies outside of the blocks: caption features on their way in, rotations, the last layer on the way out.

    The last norm runs in float32 under autocast, and so do the features of captions.
    """
    wide = FLOAT32 if keeping.autocast else keeping.width
    features = sum(captions) * config.cap_feat_dim * (2 * FLOAT32 + keeping.width)
    last = sum(images) * config.dim * (2 * wide + keeping.width)
    if keeping.adapters:  # frozen both, and the first has nothing before it that is not
        features, last = 0, sum(images) * config.dim * wide
    latents = 6 * sum(images) * config.patch_size**2 * config.in_channels * FLOAT32  # data, noise, mixture, velocity
    rotations = 2 * (sum(images) + sum(captions)) * config.head_dim // 2 * 2 * FLOAT32  # of both streams, and together
    return features + last + latents + rotations
