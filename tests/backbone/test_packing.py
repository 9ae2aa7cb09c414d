"""The packing plan and the packed attention against twins written with plain loops and dense masks."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zimage_lit.backbone.attention import attention_in_groups, packed_attention
from zimage_lit.backbone.packing import Groups, Segments, group_by_length, pack

CPU = torch.device("cpu")


def plan_by_loops(grids: list[tuple[int, int]], captions: list[int], multiple: int, order: tuple[int, ...]) -> dict:
    """What `pack` must say, token by token; labels are (sample, 'image' | 'caption', index or 'pad')."""

    def padded(kind: str, sample: int, tokens: int) -> list[tuple]:
        return [(sample, kind, i if i < tokens else "pad") for i in range(-(-tokens // multiple) * multiple)]

    images, texts, unified, positions = [], [], [], {"image": [], "caption": [], "unified": []}
    for sample in order:
        rows, columns = grids[sample]
        image = padded("image", sample, rows * columns)
        text = padded("caption", sample, captions[sample])
        text_positions = [[1 + i, 0, 0] for i in range(len(text))]
        image_positions = [
            [0, 0, 0] if index == "pad" else [len(text) + 1, index // columns, index % columns] for *_, index in image
        ]
        images += image
        texts += text
        unified += image + text
        positions["image"] += image_positions
        positions["caption"] += text_positions
        positions["unified"] += image_positions + text_positions
    return {"image": images, "caption": texts, "unified": unified, "positions": positions}


def labels(order: tuple[int, ...], counts: list[int], kind: str) -> list[tuple]:
    """The list that a source map points into: the real tokens in packed order, then the pad token."""
    return [(sample, kind, i) for sample in order for i in range(counts[sample])] + [("any", kind, "pad")]


def draw_batch(seed: int) -> tuple[list[tuple[int, int]], list[int]]:
    draw = random.Random(seed)
    samples = draw.choice([1, 2, 5, 9])
    grids = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(samples)]
    if draw.random() < 0.5:
        grids = [draw.choice(grids[:2]) for _ in range(samples)]
    return grids, [draw.choice([1, 7, 8, 9, 31, 32, 33, 64]) for _ in range(samples)]


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("seed", range(12))
def test_plan_equals_the_one_made_token_by_token(seed: int, multiple: int) -> None:
    grids, captions = draw_batch(seed)
    packing = pack(grids, captions, multiple, CPU)
    assert sorted(packing.order) == list(range(len(grids)))
    expected = plan_by_loops(grids, captions, multiple, packing.order)

    tokens = [rows * columns for rows, columns in grids]
    packed = {}
    for kind, counts, places, segments in (
        ("image", tokens, packing.real_image, packing.image),
        ("caption", captions, packing.real_caption, packing.caption),
    ):
        *real, pad = labels(packing.order, counts, kind)
        packed[kind] = [pad] * sum(segments.lengths)
        for place, label in zip(places.tolist(), real, strict=True):
            packed[kind][place] = label
        assert [label[1:] for label in packed[kind]] == [label[1:] for label in expected[kind]]
        assert all(a == b for a, b in zip(packed[kind], expected[kind], strict=True) if a[0] != "any")

    both = expected["image"] + expected["caption"]
    chunks = [both[i : i + multiple] for i in range(0, len(both), multiple)]
    assert [label for chunk in packing.unified_source.tolist() for label in chunks[chunk]] == expected["unified"]
    image_chunks = [expected["unified"][i * multiple : (i + 1) * multiple] for i in packing.image_chunks.tolist()]
    assert [label for chunk in image_chunks for label in chunk] == expected["image"]
    assert list(packing.image_tokens) == [tokens[sample] for sample in packing.order]


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("seed", range(12))
def test_segments_equal_those_made_token_by_token(seed: int, multiple: int) -> None:
    grids, captions = draw_batch(seed)
    packing = pack(grids, captions, multiple, CPU)
    expected = plan_by_loops(grids, captions, multiple, packing.order)
    for kind in ("image", "caption", "unified"):
        segments: Segments = getattr(packing, kind)
        samples = [label[0] for label in expected[kind]]
        lengths = [samples.count(sample) for sample in packing.order]
        assert segments.rotation_index.tolist() == expected["positions"][kind]
        assert list(segments.lengths) == lengths
        assert segments.cumulative.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        check_groups(segments.groups, lengths)
        assert [packing.order[place] for place in segments.sample_of_chunk.tolist()] == samples[::multiple]
        assert [count * multiple for count in segments.chunks_of_sample.tolist()] == lengths


def check_groups(groups: Groups, lengths: list[int]) -> None:
    """Every token has one place, a sample's tokens stand in a row of their own, and the masks tell them from pads."""
    places = [None] * sum(count * length for count, length in groups.sizes)
    for token, place in enumerate(groups.place.tolist()):
        assert places[place] is None and groups.source[place] == token
        places[place] = token
    assert [place for place, token in enumerate(places) if token is None] == groups.pads.tolist()
    starts = dict(zip(itertools.accumulate([0, *lengths[:-1]]), lengths, strict=True))
    rest = iter(places)
    for (count, length), mask in zip(groups.sizes, groups.masks, strict=True):
        rows = [list(itertools.islice(rest, length)) for _ in range(count)]
        for row in rows:
            size = starts.pop(row[0])
            assert row == [*range(row[0], row[0] + size), *[None] * (length - size)]
        told = [[float("-inf") if token is None else 0.0 for token in row] for row in rows]
        assert mask is None if not any(map(any, told)) else mask.flatten(1).tolist() == told
    assert not starts


def test_samples_share_a_group_where_padding_costs_less_than_another_call() -> None:
    def sizes(*lengths: int) -> tuple[tuple[int, int], ...]:
        return group_by_length(np.array(lengths), CPU).sizes

    assert sizes(64, 96, 64, 64) == ((1, 96), (3, 64))  # 3 * (96^2 - 64^2) pairs of tokens would be added
    assert sizes(64, 96, 64, 88) == ((2, 96), (2, 64))  # 96^2 - 88^2 are fewer than a call costs
    assert sizes(20, 32, 20, 36, 100) == ((1, 100), (4, 36))
    assert sizes(1024, 1024, 1024) == ((3, 1024),)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Dense attention of all tokens to all, with the block-diagonal mask that packing makes unnecessary."""
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(query.device)
    mask = sample[:, None] == sample[None, :]
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@pytest.mark.parametrize(
    ("grids", "captions", "multiple", "padded"),
    [
        ([(4, 8), (4, 8), (3, 5), (9, 9)], [10, 40, 32, 64], 32, False),
        ([(4, 4), (4, 4), (6, 4), (4, 6), (4, 4)], [3, 9, 1, 17, 33], 4, True),
        ([(4, 8)] * 3, [10] * 3, 32, False),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_packed_attention_equals_dense_attention_with_a_block_diagonal_mask(
    grids: list, captions: list[int], multiple: int, padded: bool, dtype: torch.dtype, tolerance: float
) -> None:
    segments = pack(grids, captions, multiple, CPU).unified
    assert bool(len(segments.groups.pads)) == padded
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(segments.lengths), 3, 16, generator=generator).to(dtype) for _ in range(4)]
    results = []
    for attend in (packed_attention, lambda q, k, v, s: masked_attention(q, k, v, s.lengths)):
        kind = dtype if attend is packed_attention else torch.float32
        query, key, value, sent = (x.to(kind, copy=True).requires_grad_() for x in inputs)
        output = attend(query, key, value, segments)
        output.backward(sent.detach())
        results.append([output, query.grad, key.grad, value.grad])
    for actual, expected in zip(*results, strict=True):
        assert F.mse_loss(actual.float(), expected).sqrt() <= tolerance * expected.std()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernel needs a GPU")
def test_variable_length_kernel_equals_dense_groups() -> None:
    device = torch.device("cuda")
    segments = pack([(4, 8), (4, 8), (3, 5), (9, 9)], [10, 40, 32, 64], 32, device).unified
    inputs = [torch.randn(sum(segments.lengths), 3, 128, device=device, dtype=torch.bfloat16) for _ in range(3)]
    actual, expected = packed_attention(*inputs, segments), attention_in_groups(*inputs, segments.groups)
    exact = masked_attention(*(x.float() for x in inputs), segments.lengths)
    assert F.mse_loss(actual.float(), exact) <= 2 * F.mse_loss(expected.float(), exact) + 1e-8
