"""Mask2Former with a Swin backbone as mmdet 2 has it, small: the answer that a converted checkpoint must give.

Written from the papers (Swin, arXiv 2103.14030; Deformable DETR, 2010.04159; Mask2Former, 2112.01527) and mmdet's
names and orders, with nothing of transformers: its state dict has the names and shapes of mmdet's checkpoints.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, interpolate, pad, unfold

WIDTH, HEADS, LEVELS, POINTS, WINDOW = 32, 4, 3, 4, 3
DEPTHS, SWIN_HEADS, SWIN_WIDTHS = (2, 1, 2, 1), (1, 2, 2, 4), (8, 16, 32, 64)
ENCODER_LAYERS, DECODER_LAYERS, HIDDEN, QUERIES, CLASSES = 2, 4, 24, 7, 80
CONFIG: dict[
    str, dict[str, Any]
] = {  # the same sizes as transformers' Mask2FormerConfig has them; `backbone` is of its SwinConfig
    "backbone": {
        "embed_dim": SWIN_WIDTHS[0],
        "depths": list(DEPTHS),
        "num_heads": list(SWIN_HEADS),
        "window_size": WINDOW,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "head": {
        "num_labels": CLASSES,
        "num_queries": QUERIES,
        "feature_size": WIDTH,
        "mask_feature_size": WIDTH,
        "hidden_dim": WIDTH,
        "num_attention_heads": HEADS,
        "encoder_layers": ENCODER_LAYERS,
        "encoder_feedforward_dim": HIDDEN,
        "decoder_layers": DECODER_LAYERS + 1,
        "dim_feedforward": HIDDEN,
    },
}


def module(**parts: nn.Module) -> nn.Module:
    """Parts under names."""
    whole = nn.Module()
    for name, part in parts.items():
        whole.add_module(name, part)
    return whole


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, activation: type[nn.Module]) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(width, hidden), activation())
        self.layers = nn.Sequential(inner, nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class WindowAttention(nn.Module):
    """Attention among the pixels of a window, by their relative positions. x: (windows, WINDOW**2, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        index = [
            [
                (a // WINDOW - b // WINDOW + WINDOW - 1) * (2 * WINDOW - 1) + a % WINDOW - b % WINDOW + WINDOW - 1
                for b in range(WINDOW**2)
            ]
            for a in range(WINDOW**2)
        ]
        self.register_buffer("relative_position_index", torch.tensor(index))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        """apart: bool (windows, WINDOW**2, WINDOW**2), pixels that are no neighbours in the picture."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        likeness = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias - 100.0 * apart[:, None]
        return self.proj((likeness.softmax(-1) @ v).transpose(1, 2).flatten(2))


class SwinBlock(nn.Module):
    """x: (H, W, C)."""

    def __init__(self, width: int, heads: int, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = module(w_msa=WindowAttention(width, heads))
        self.ffn = FeedForward(width, 4 * width, nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        height, width, _ = x.shape
        y = pad(self.norm1(x), (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        y = y.roll((-self.shift, -self.shift), (0, 1))
        down, right = (self._region(size) for size in y.shape[:2])
        regions = self._windows((3 * down[:, None] + right)[..., None])[..., 0]
        seen = self.attn.w_msa(self._windows(y), regions[:, :, None] != regions[:, None, :])
        rows, columns = y.shape[0] // WINDOW, y.shape[1] // WINDOW
        y = seen.unflatten(0, (rows, columns)).unflatten(2, (WINDOW, WINDOW)).transpose(1, 2).reshape(y.shape)
        x = x + y.roll((self.shift, self.shift), (0, 1))[:height, :width]
        return x + self.ffn(self.norm2(x))

    def _region(self, size: int) -> Tensor:
        """Of an axis that was shifted: 0 up to the last window, there 1, and 2 for what has come round."""
        place = torch.arange(size)
        last = (place >= size - WINDOW).long()
        return last + (place >= size - self.shift).long() if self.shift else torch.zeros(size).long()

    @staticmethod
    def _windows(x: Tensor) -> Tensor:
        height, width, channels = x.shape
        x = x.view(height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
        return x.transpose(1, 2).reshape(-1, WINDOW**2, channels)


class PatchMerging(nn.Module):
    """(H, W, C) -> (H / 2, W / 2, 2 C), rounded up, as mmdet does it: with nn.Unfold's order of channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
        columns = unfold(x.permute(2, 0, 1)[None], kernel_size=2, stride=2)[0].T
        return self.reduction(self.norm(columns)).view(x.shape[0] // 2, x.shape[1] // 2, -1)


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        projection = nn.Conv2d(3, SWIN_WIDTHS[0], 4, 4)
        self.patch_embed = module(projection=projection, norm=nn.LayerNorm(SWIN_WIDTHS[0]))
        self.stages = nn.ModuleList()
        for i, (width, depth, heads) in enumerate(zip(SWIN_WIDTHS, DEPTHS, SWIN_HEADS, strict=True)):
            blocks = [SwinBlock(width, heads, j % 2 * (WINDOW // 2)) for j in range(depth)]
            last = {"downsample": PatchMerging(width)} if i < 3 else {}
            self.stages.append(module(blocks=nn.ModuleList(blocks), **last))
            self.add_module(f"norm{i}", nn.LayerNorm(width))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """(3, H, W) -> four maps (C, H / 4, W / 4) to (C, H / 32, W / 32)."""
        x = self.patch_embed.norm(self.patch_embed.projection(pixels[None])[0].permute(1, 2, 0))
        maps = []
        for i, stage in enumerate(self.stages):
            for block in stage.blocks:
                x = block(x)
            maps.append(self.get_submodule(f"norm{i}")(x).permute(2, 0, 1))
            x = stage.downsample(x) if i < 3 else x
        return maps


class DeformableAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sampling_offsets = nn.Linear(WIDTH, HEADS * LEVELS * POINTS * 2)
        self.attention_weights = nn.Linear(WIDTH, HEADS * LEVELS * POINTS)
        self.value_proj, self.output_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, positions: Tensor, centres: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """x, positions: (N, C), all pixels of all levels.   centres: (N, 2), theirs as (x, y) in [0, 1]."""
        query = x + positions
        offsets = self.sampling_offsets(query).view(-1, HEADS, LEVELS, POINTS, 2)
        weights = self.attention_weights(query).view(-1, HEADS, LEVELS * POINTS).softmax(-1)
        weights = weights.view(-1, HEADS, LEVELS, POINTS)
        values = self.value_proj(x).view(-1, HEADS, WIDTH // HEADS).split([h * w for h, w in sizes])
        found = torch.zeros(len(x), HEADS, WIDTH // HEADS)
        for level, (height, width) in enumerate(sizes):
            image = values[level].permute(1, 2, 0).reshape(HEADS, -1, height, width)
            place = centres[:, None, None] + offsets[:, :, level] / torch.tensor([width, height])
            sampled = grid_sample(image, 2 * place.transpose(0, 1) - 1, align_corners=False)  # (HEADS, C, N, POINTS)
            found += torch.einsum("hcnp,nhp->nhc", sampled, weights[:, :, level])
        return self.output_proj(found.flatten(1))


class PixelDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        low_to_high = SWIN_WIDTHS[:0:-1]
        self.input_convs = nn.ModuleList(
            module(conv=nn.Conv2d(width, WIDTH, 1), gn=nn.GroupNorm(32, WIDTH)) for width in low_to_high
        )
        layers = [
            module(
                attentions=nn.ModuleList([DeformableAttention()]),
                norms=nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)]),
                ffns=nn.ModuleList([FeedForward(WIDTH, HIDDEN, nn.ReLU)]),
            )
            for _ in range(ENCODER_LAYERS)
        ]
        self.encoder = module(layers=nn.ModuleList(layers))
        self.level_encoding = nn.Embedding(LEVELS, WIDTH)
        lateral = module(conv=nn.Conv2d(SWIN_WIDTHS[0], WIDTH, 1, bias=False), gn=nn.GroupNorm(32, WIDTH))
        output = module(conv=nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), gn=nn.GroupNorm(32, WIDTH))
        self.lateral_convs, self.output_convs = nn.ModuleList([lateral]), nn.ModuleList([output])
        self.mask_feature = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Features of masks (C, H / 4, W / 4), and three levels from low to high resolution."""
        levels = maps[:0:-1]
        sizes = [(level.shape[1], level.shape[2]) for level in levels]
        x = torch.cat([_flat(conv.gn(conv.conv(m[None])))[0] for conv, m in zip(self.input_convs, levels, strict=True)])
        positions = torch.cat([sine(*size) + self.level_encoding.weight[i] for i, size in enumerate(sizes)])
        centres = torch.cat([_centres(*size) for size in sizes])
        for layer in self.encoder.layers:
            x = layer.norms[0](x + layer.attentions[0](x, positions, centres, sizes))
            x = layer.norms[1](x + layer.ffns[0](x))
        parts = x.split([height * width for height, width in sizes])
        outs = [part.T.reshape(WIDTH, *size) for part, size in zip(parts, sizes, strict=True)]
        lateral, output = self.lateral_convs[0], self.output_convs[0]
        fine = lateral.gn(lateral.conv(maps[0][None]))
        fine = fine + interpolate(outs[-1][None], fine.shape[-2:], mode="bilinear")
        fine = output.gn(output.conv(fine)).relu()
        return self.mask_feature(fine)[0], outs


class PanopticHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pixel_decoder = PixelDecoder()
        layers = [
            module(
                attentions=nn.ModuleList(module(attn=nn.MultiheadAttention(WIDTH, HEADS)) for _ in range(2)),
                norms=nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3)),
                ffns=nn.ModuleList([FeedForward(WIDTH, HIDDEN, nn.ReLU)]),
            )
            for _ in range(DECODER_LAYERS)
        ]
        self.transformer_decoder = module(layers=nn.ModuleList(layers), post_norm=nn.LayerNorm(WIDTH))
        self.query_embed, self.query_feat = nn.Embedding(QUERIES, WIDTH), nn.Embedding(QUERIES, WIDTH)
        self.level_embed = nn.Embedding(LEVELS, WIDTH)
        self.cls_embed = nn.Linear(WIDTH, CLASSES + 1)
        sizes = [WIDTH] * 4
        linear = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())]
        self.mask_embed = nn.Sequential(*linear[:-1])

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        features, levels = self.pixel_decoder(maps)
        x, at = self.query_feat.weight, self.query_embed.weight
        for i, layer in enumerate(self.transformer_decoder.layers):
            level = levels[i % LEVELS]
            hidden = interpolate(self._masks(x, features)[None], level.shape[1:], mode="bilinear")[0].flatten(1) < 0
            hidden = hidden & ~hidden.all(1, keepdim=True)  # who would see nothing sees all
            memory = _flat(level[None])[0] + self.level_embed.weight[i % LEVELS]
            cross, own = (attention.attn for attention in layer.attentions)
            x = layer.norms[0](x + cross(x + at, memory + sine(*level.shape[1:]), memory, attn_mask=hidden)[0])
            x = layer.norms[1](x + own(x + at, x + at, x)[0])
            x = layer.norms[2](x + layer.ffns[0](x))
        return self.cls_embed(self.transformer_decoder.post_norm(x)), self._masks(x, features)

    def _masks(self, x: Tensor, features: Tensor) -> Tensor:
        return torch.einsum("qc,chw->qhw", self.mask_embed(self.transformer_decoder.post_norm(x)), features)


class Mask2Former(nn.Module):
    """(3, H, W) -> logits of classes (QUERIES, CLASSES + 1) and of masks (QUERIES, H / 4, W / 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Swin()
        self.panoptic_head = PanopticHead()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.panoptic_head(self.backbone(pixels))


def sine(height: int, width: int) -> Tensor:
    """(height * width, WIDTH): half of the channels tell the row, the others the column."""
    table = torch.zeros(height, width, WIDTH)
    for axis, size in enumerate((height, width)):
        angle = torch.arange(1, size + 1) / (size + 1e-6) * 2 * math.pi
        for channel in range(WIDTH // 2):
            wave = angle / 10000 ** (channel // 2 * 2 / (WIDTH // 2))
            value = wave.cos() if channel % 2 else wave.sin()
            table[..., axis * WIDTH // 2 + channel] = value[:, None] if axis == 0 else value
    return table.flatten(0, 1)


def _flat(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def _centres(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack([x / width, y / height], -1).flatten(0, 1)
