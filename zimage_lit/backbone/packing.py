"""Where every token of every sample lies when a batch of unequal samples travels as one packed sequence.

Each sample brings a caption segment and an image segment, both padded to a multiple of `pad_multiple` with learned
tokens that are attended. Where attention has no kernel for unequal lengths it runs over groups of like ones, padded
for it alone to the longest. Because every segment is a whole number of chunks of `pad_multiple` tokens, a packed
tensor is kept as (chunks, pad_multiple, dim) and what belongs to a sample (modulation) is looked up once a chunk.
"""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

# What one more dense call costs on a CPU, in pairs of tokens that attend to each other: 0.4 ms against 46 ns a pair,
# forward and backward at four heads of 32.
PAIRS_OF_A_CALL = 8192


@dataclass(frozen=True)
class Groups:
    """Samples of like length, each group one dense batch (samples, length) in which the shorter ones are padded."""

    sizes: tuple[tuple[int, int], ...]  # (samples, length)
    masks: tuple[Tensor | None, ...]  # (samples, 1, 1, length) float32, 0 or at pads -inf; None for a group without
    source: Tensor  # (places,) int64: the token there, in packed order; any at a pad
    place: Tensor  # (T,) int64: where each token is
    pads: Tensor  # (pads,) int64: places without a token


@dataclass(frozen=True)
class Segments:
    """Sample boundaries of one packed sequence; `lengths` are multiples of the chunk length."""

    lengths: tuple[int, ...]
    longest: int  # of the lengths; a number by itself, so that code compiled for one batch serves the next as well
    groups: Groups
    cumulative: Tensor  # (B + 1,) int32, for variable-length kernels
    sample_of_chunk: Tensor  # (T / pad_multiple,) int64
    chunks_of_sample: Tensor  # (B,) int64: how many
    rotation_index: Tensor  # (T, 3) int64: positions on the rotary axes


@dataclass(frozen=True)
class Packing:
    """Index maps of one batch; sources point into the concatenation named beside them."""

    order: tuple[int, ...]  # packed place -> place in the caller's list
    image: Segments
    caption: Segments
    unified: Segments
    unified_source: Tensor  # (chunks,) into [image chunks, caption chunks]
    image_chunks: Tensor  # (image chunks,) into unified chunks
    real_image: Tensor  # (real image tokens,) into packed image tokens
    real_caption: Tensor  # (real caption tokens,) into packed caption tokens
    image_tokens: tuple[int, ...]  # real tokens of each sample, packed order


def _within(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each n in lengths, concatenated."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def _segments(padded: np.ndarray, positions: np.ndarray, multiple: int, device: torch.device) -> Segments:
    return Segments(
        lengths=tuple(padded.tolist()),
        longest=int(padded.max()),
        groups=group_by_length(padded, device),
        cumulative=torch.tensor(np.concatenate([[0], np.cumsum(padded)]), dtype=torch.int32, device=device),
        sample_of_chunk=torch.from_numpy(np.repeat(np.arange(len(padded)), padded // multiple)).to(device),
        chunks_of_sample=torch.from_numpy(padded // multiple).to(device),
        rotation_index=torch.from_numpy(positions).to(device),
    )


def group_by_length(lengths: np.ndarray, device: torch.device) -> Groups:
    """Samples of like length together: a shorter one is padded where that costs less than one more call."""
    order = np.argsort(-lengths, kind="stable")
    sizes: list[tuple[int, int]] = []
    for length, samples in zip(*(x[::-1].tolist() for x in np.unique(lengths, return_counts=True)), strict=True):
        if sizes and samples * (sizes[-1][1] ** 2 - length**2) < PAIRS_OF_A_CALL:
            sizes[-1] = (sizes[-1][0] + samples, sizes[-1][1])
        else:
            sizes.append((samples, length))
    room = np.repeat([length for _, length in sizes], [samples for samples, _ in sizes])  # of each sample, in order
    within = _within(room)
    real = within < np.repeat(lengths[order], room)
    starts = np.cumsum(lengths) - lengths
    source = np.where(real, np.repeat(starts[order], room) + within, 0)
    place = np.empty(lengths.sum(), int)
    place[source[real]] = np.flatnonzero(real)
    masks: list[Tensor | None] = []
    for part, size in zip(np.split(real, np.cumsum([a * b for a, b in sizes])[:-1]), sizes, strict=True):
        mask = torch.from_numpy(np.where(part, np.float32(0), np.float32(-np.inf)).reshape(size[0], 1, 1, size[1]))
        masks.append(None if part.all() else mask.to(device))
    indices = (torch.from_numpy(x).to(device) for x in (source, place, np.flatnonzero(~real)))
    return Groups(tuple(sizes), tuple(masks), *indices)


def pack(grids: list[tuple[int, int]], caption_lengths: list[int], pad_multiple: int, device: torch.device) -> Packing:
    """Plan a batch of samples with token grids (rows, columns) and caption lengths; no loop over tokens.

    Positions (caption index, row, column): caption token k sits at (1 + k, 0, 0), pads continue the count; the image
    sits at (padded caption length + 1, row, column); image pads at (0, 0, 0).
    """
    order = tuple(sorted(range(len(grids)), key=lambda i: (*grids[i], caption_lengths[i])))
    rows, columns = (np.array([grids[i][axis] for i in order]) for axis in (0, 1))
    captions = np.array([caption_lengths[i] for i in order])
    tokens = rows * columns
    padded_images = -(-tokens // pad_multiple) * pad_multiple
    padded_captions = -(-captions // pad_multiple) * pad_multiple

    place = _within(padded_images)
    real = place < np.repeat(tokens, padded_images)
    width = np.repeat(columns, padded_images)
    after_caption = np.repeat(padded_captions + 1, padded_images)
    image_positions = np.stack([after_caption, place // width, place % width], axis=1) * real[:, None]
    caption_positions = np.stack([_within(padded_captions) + 1] + [np.zeros(padded_captions.sum(), int)] * 2, axis=1)

    image_chunks, caption_chunks = padded_images // pad_multiple, padded_captions // pad_multiple
    chunk = _within(image_chunks + caption_chunks)
    images_here = np.repeat(image_chunks, image_chunks + caption_chunks)
    image_start = np.repeat(np.cumsum(image_chunks) - image_chunks, image_chunks + caption_chunks)
    caption_start = np.repeat(np.cumsum(caption_chunks) - caption_chunks, image_chunks + caption_chunks)
    unified = np.where(
        chunk < images_here, image_start + chunk, image_chunks.sum() + caption_start + chunk - images_here
    )
    both = np.concatenate([image_positions, caption_positions]).reshape(-1, pad_multiple, 3)

    def index(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return Packing(
        order=order,
        image=_segments(padded_images, image_positions, pad_multiple, device),
        caption=_segments(padded_captions, caption_positions, pad_multiple, device),
        unified=_segments(padded_images + padded_captions, both[unified].reshape(-1, 3), pad_multiple, device),
        unified_source=index(unified),
        image_chunks=index(np.flatnonzero(chunk < images_here)),
        real_image=index(np.flatnonzero(real)),
        real_caption=index(np.flatnonzero(_within(padded_captions) < np.repeat(captions, padded_captions))),
        image_tokens=tuple(tokens.tolist()),
    )


def per_chunk(of_samples: Tensor, segments: Segments) -> Tensor:
    """What each sample has, (B, n), for each of its chunks: (chunks, 1, n)."""
    return cast(Tensor, _PerChunk.apply(of_samples, segments.sample_of_chunk, segments.chunks_of_sample))


class _PerChunk(torch.autograd.Function):
    """A lookup whose gradient is summed sample by sample, in one order always: torch's own adds in the order of chance.

    With that, float32 training on two CPU threads would not repeat itself bit for bit, nor would it on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, of_samples: Tensor, sample_of_chunk: Tensor, chunks_of_sample: Tensor) -> Tensor:
        ctx.save_for_backward(chunks_of_sample)
        return of_samples.index_select(0, sample_of_chunk).unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (chunks_of_sample,) = ctx.saved_tensors
        wide = gradient.squeeze(1).to(torch.promote_types(gradient.dtype, torch.float32))
        return torch.segment_reduce(wide, "sum", lengths=chunks_of_sample).to(gradient.dtype), None, None
