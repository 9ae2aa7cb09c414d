"""Where every token of every sample lies when a batch of unequal samples travels as one packed sequence.

Each sample brings a caption segment and an image segment, both padded to a multiple of `pad_multiple` with learned
tokens that are attended. Samples are sorted by size, so equal lengths are neighbours and attention can run over each
neighbourhood as one dense batch. Because every segment is a whole number of chunks of `pad_multiple` tokens, a packed
tensor is kept as (chunks, pad_multiple, dim) and what belongs to a sample (modulation) is looked up once a chunk.
"""

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Sample boundaries of one packed sequence; `lengths` are multiples of the chunk length."""

    lengths: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]  # (samples, length) of neighbours of equal length
    cumulative: Tensor  # (B + 1,) int32, for variable-length kernels
    sample_of_chunk: Tensor  # (T / pad_multiple,) int64
    rotation_index: Tensor  # (T, 3) int64: positions on the rotary axes


@dataclass(frozen=True)
class Packing:
    """Index maps of one batch; sources point into the concatenation named beside them."""

    order: tuple[int, ...]  # packed place -> place in the caller's list
    image: Segments
    caption: Segments
    unified: Segments
    image_source: Tensor  # (T_image,) into [real image tokens, image pad token]
    caption_source: Tensor  # (T_caption,) into [real caption tokens, caption pad token]
    unified_source: Tensor  # (chunks,) into [image chunks, caption chunks]
    image_chunks: Tensor  # (image chunks,) into unified chunks
    real_image: Tensor  # (real image tokens,) into packed image tokens
    image_tokens: tuple[int, ...]  # real tokens of each sample, packed order


def _within(lengths: np.ndarray) -> np.ndarray:
    """0..n-1 for each n in lengths, concatenated."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def _source(real: np.ndarray, padded: np.ndarray) -> np.ndarray:
    """For each packed place the row of its real token, or real.sum() (the pad token) past a segment's end."""
    place, length = _within(padded), np.repeat(real, padded)
    starts = np.repeat(np.cumsum(real) - real, padded)
    return np.where(place < length, starts + place, real.sum())


def _segments(padded: np.ndarray, positions: np.ndarray, multiple: int, device: torch.device) -> Segments:
    chunks = np.repeat(np.arange(len(padded)), padded // multiple)
    return Segments(
        lengths=tuple(padded.tolist()),
        runs=tuple((len(list(group)), length) for length, group in groupby(padded.tolist())),
        cumulative=torch.tensor(np.concatenate([[0], np.cumsum(padded)]), dtype=torch.int32, device=device),
        sample_of_chunk=torch.from_numpy(chunks).to(device),
        rotation_index=torch.from_numpy(positions).to(device),
    )


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
        image_source=index(_source(tokens, padded_images)),
        caption_source=index(_source(captions, padded_captions)),
        unified_source=index(unified),
        image_chunks=index(np.flatnonzero(chunk < images_here)),
        real_image=index(np.flatnonzero(real)),
        image_tokens=tuple(tokens.tolist()),
    )
