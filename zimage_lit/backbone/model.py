"""S3-DiT, the scalable single-stream diffusion transformer of Z-Image (arXiv 2511.22699, section 4).

Read top-down: the network, its block, then the parts of a block. Parameter names are the published ones, so a
published checkpoint loads as it is. Packed tensors are (chunks, pad_multiple, dim), see `packing.py`.
"""

import math
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zimage_lit.backbone import checkpoints
from zimage_lit.backbone.attention import packed_attention
from zimage_lit.backbone.config import S3DiTConfig
from zimage_lit.backbone.norm import RMSNorm
from zimage_lit.backbone.packing import Packing, Segments, pack, per_chunk
from zimage_lit.backbone.rope import rotation_tables, rotations
from zimage_lit.errors import UserError


class S3DiT(nn.Module):
    """Velocity network v(x_t, t, caption) for latents of any sizes in one batch.

    All layers run on packed tokens; only laying out the latents and cutting the result apart goes sample by sample.
    """

    def __init__(self, config: S3DiTConfig) -> None:
        super().__init__()
        self.config = config
        patch_key = f"{config.patch_size}-1"
        patch_dim = config.patch_size**2 * config.in_channels
        self.all_x_embedder = nn.ModuleDict({patch_key: nn.Linear(patch_dim, config.dim)})
        self.all_final_layer = nn.ModuleDict({patch_key: FinalLayer(config, patch_dim)})
        self.noise_refiner = nn.ModuleList(Block(config, modulated=True) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(Block(config, modulated=False) for _ in range(config.n_refiner_layers))
        self.t_embedder = TimestepEmbedder(config.modulation_dim, config.t_scale)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, config.norm_eps), nn.Linear(config.cap_feat_dim, config.dim)
        )
        self.x_pad_token = nn.Parameter(torch.empty(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.empty(1, config.dim))
        self.layers = nn.ModuleList(Block(config, modulated=True) for _ in range(config.n_layers))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights for training from nothing: torch's own for every part but pad tokens and one bias."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for embedder in self.all_x_embedder.values():
            # Places enter by rotation alone, and only what image tokens have in common tells places apart when rotated.
            nn.init.normal_(cast(nn.Linear, embedder).bias)
        nn.init.normal_(self.x_pad_token, std=0.02)
        nn.init.normal_(self.cap_pad_token, std=0.02)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None) -> "S3DiT":
        """Load a folder in the published layout (or a ComfyUI single file); see `checkpoints.load`."""
        return checkpoints.load(cls, Path(path), dtype)

    def save_pretrained(self, path: str | Path) -> None:
        """Write `config.json` and safetensors shards in the published layout."""
        checkpoints.save(self, Path(path))

    def forward(self, latents: list[Tensor], t: Tensor, captions: list[Tensor]) -> list[Tensor]:
        """Velocities of a batch.

        latents: B tensors (C, H_i, W_i) with H and W divisible by the patch size, any sizes.
        t: (B,) in [0, 1], 0 = noise, 1 = clean.   captions: B tensors (L_i, cap_feat_dim), L_i >= 1.
        Returns B tensors (C, H_i, W_i) of the latents' dtype: v = clean - noise, in the caller's order.
        """
        packing = self.plan(latents, t, captions)
        tables = rotation_tables(
            tuple(self.config.axes_dims), tuple(self.config.axes_lens), self.config.rope_theta, t.device
        )
        order = list(packing.order)
        conditioning = self.t_embedder(t[order])

        image = self.embed_images([latents[i] for i in order], packing)
        image_rotation = rotations(packing.image.rotation_index, tables)
        for block in self.noise_refiner:
            image = block(image, packing.image, image_rotation, conditioning)

        caption = self.embed_captions([captions[i] for i in order], packing)
        caption_rotation = rotations(packing.caption.rotation_index, tables)
        for block in self.context_refiner:
            caption = block(caption, packing.caption, caption_rotation)

        tokens = torch.cat([image, caption]).index_select(0, packing.unified_source)
        rotation = rotations(packing.unified.rotation_index, tables)
        for block in self.layers:
            tokens = block(tokens, packing.unified, rotation, conditioning)

        (final_layer,) = self.all_final_layer.values()
        patches = final_layer(tokens.index_select(0, packing.image_chunks), packing.image, conditioning)
        patches = patches.flatten(0, 1).index_select(0, packing.real_image)
        velocities = self.unpatchify(patches, [latents[i].shape for i in order], packing)
        return [velocity.to(latents[0].dtype) for velocity in velocities]

    def plan(self, latents: list[Tensor], t: Tensor, captions: list[Tensor]) -> Packing:
        """Check the shapes of a batch and lay out its tokens."""
        config, patch = self.config, self.config.patch_size
        if not latents or not len(latents) == len(captions) == len(t) or t.ndim != 1:
            raise UserError(
                f"a batch needs as many latents, times and captions, got {len(latents)}, {tuple(t.shape)} and "
                f"{len(captions)}."
            )
        for latent, caption in zip(latents, captions, strict=True):
            channels, height, width = latent.shape
            if channels != config.in_channels or height % patch or width % patch:
                raise UserError(
                    f"latent of shape {tuple(latent.shape)}: the backbone takes {config.in_channels} channels and "
                    f"height and width divisible by {patch}."
                )
            padded_caption = -(-len(caption) // config.pad_multiple) * config.pad_multiple
            if max(height, width) // patch > min(config.axes_lens[1:]) or padded_caption + 2 > config.axes_lens[0]:
                raise UserError(
                    f"latent of shape {tuple(latent.shape)} with a caption of {len(caption)} tokens exceeds the "
                    f"positions that axes_lens {config.axes_lens} provides."
                )
            if caption.shape[-1] != config.cap_feat_dim or len(caption) == 0:
                raise UserError(
                    f"caption features of shape {tuple(caption.shape)}: expected (at least one token, "
                    f"cap_feat_dim {config.cap_feat_dim})."
                )
        grids = [(x.shape[1] // patch, x.shape[2] // patch) for x in latents]
        return pack(grids, [len(caption) for caption in captions], config.pad_multiple, latents[0].device)

    def embed_images(self, latents: list[Tensor], packing: Packing) -> Tensor:
        (embedder,) = self.all_x_embedder.values()
        real = embedder(patchify(latents, self.config.patch_size).to(self.x_pad_token.dtype))
        return self.with_pads(real, self.x_pad_token, packing.real_image, packing.image)

    def embed_captions(self, captions: list[Tensor], packing: Packing) -> Tensor:
        real = self.cap_embedder(torch.cat(captions).to(self.cap_pad_token.dtype))
        return self.with_pads(real, self.cap_pad_token, packing.real_caption, packing.caption)

    def with_pads(self, real: Tensor, pad_token: Tensor, places: Tensor, segments: Segments) -> Tensor:
        """Real tokens at their packed places, the learned pad token elsewhere: (chunks, pad_multiple, dim)."""
        packed = pad_token.to(real.dtype).expand(sum(segments.lengths), -1).index_copy(0, places, real)
        return packed.unflatten(0, (-1, self.config.pad_multiple))

    def unpatchify(self, patches: Tensor, shapes: list[torch.Size], packing: Packing) -> list[Tensor]:
        """(real image tokens, patch_dim) in packed order -> one (C, H, W) per sample in the caller's order."""
        patch = self.config.patch_size
        velocities: dict[int, Tensor] = {}
        for place, shape, sample in zip(packing.order, shapes, patches.split(packing.image_tokens), strict=True):
            channels, height, width = shape
            grid = sample.view(height // patch, width // patch, patch, patch, channels)
            velocities[place] = grid.permute(4, 0, 2, 1, 3).reshape(channels, height, width)
        return [velocities[place] for place in range(len(shapes))]


def patchify(latents: list[Tensor], patch: int) -> Tensor:
    """Tokens of all samples in turn, row-major; inside a token the channel runs fastest. -> (tokens, patch_dim)."""
    tokens = []
    for x in latents:
        channels, height, width = x.shape
        grid = x.view(channels, height // patch, patch, width // patch, patch)
        tokens.append(grid.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels))
    return torch.cat(tokens)


class Block(nn.Module):
    """Sandwich-norm transformer block; when modulated, scales and tanh gates (no shifts) come from the conditioning."""

    def __init__(self, config: S3DiTConfig, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, config.norm_eps)
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(config.modulation_dim, 4 * config.dim))

    def forward(self, x: Tensor, segments: Segments, rotation: Tensor, conditioning: Tensor | None = None) -> Tensor:
        """x (chunks, pad_multiple, dim); conditioning (B, modulation_dim) or None for an unmodulated block."""
        if conditioning is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), segments, rotation))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        modulation = per_chunk(self.adaLN_modulation(conditioning), segments)
        attention_scale, attention_gate, ffn_scale, ffn_gate = modulation.chunk(4, dim=-1)
        attended = self.attention(self.attention_norm1(x, 1 + attention_scale), segments, rotation)
        x = x + self.attention_norm2(attended, attention_gate.tanh())
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x, 1 + ffn_scale)), ffn_gate.tanh())


class Attention(nn.Module):
    """Multi-head attention with per-head RMS norm of queries and keys before the rotation; no biases."""

    def __init__(self, config: S3DiTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.to_k = nn.Linear(config.dim, config.dim, bias=False)
        self.to_v = nn.Linear(config.dim, config.dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(config.dim, config.dim, bias=False)])
        self.norm_q = RMSNorm(config.head_dim, config.norm_eps)
        self.norm_k = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, segments: Segments, rotation: Tensor) -> Tensor:
        query, key, value = (
            to(x).flatten(0, 1).unflatten(-1, (self.n_heads, -1)) for to in (self.to_q, self.to_k, self.to_v)
        )
        query, key = self.norm_q(query, rotation=rotation), self.norm_k(key, rotation=rotation)
        attended = packed_attention(query, key, value, segments)
        return self.to_out[0](attended.flatten(-2).view_as(x))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: S3DiTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class FinalLayer(nn.Module):
    """Parameter-free layer norm, scale from the conditioning, projection to patches."""

    def __init__(self, config: S3DiTConfig, patch_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(config.dim, patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.modulation_dim, config.dim))

    def forward(self, x: Tensor, segments: Segments, conditioning: Tensor) -> Tensor:
        scale = 1 + per_chunk(self.adaLN_modulation(conditioning), segments)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale)


class TimestepEmbedder(nn.Module):
    """Sinusoids of t * t_scale (cosines first), then a two-layer perceptron: (B,) -> (B, modulation_dim)."""

    def __init__(self, dim: int, t_scale: float) -> None:
        super().__init__()
        self.t_scale = t_scale
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoids(t.float() * self.t_scale, 256).to(cast(nn.Linear, self.mlp[0]).weight.dtype))


def sinusoids(t: Tensor, dim: int) -> Tensor:
    """(B,) -> (B, dim) float32: cosines then sines of t at `dim / 2` rates from 1 down to almost 1 / 10000."""
    half = dim // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
