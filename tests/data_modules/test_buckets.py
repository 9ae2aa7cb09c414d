"""The size a picture is trained at, against a brute-force twin, and the resizing to it."""

import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_modules import buckets
from data_modules.buckets import SizeMapping, image_tokens, resize_to
from zimage_lit.errors import UserError

SETTINGS: list[dict[str, Any]] = [
    {},
    {"resolution": 256},
    {"resolution": 1500, "multiple": 32},
    {"resolution": 512, "upscale": True},
    {"resolution": 1024, "multiple": 64, "upscale": True, "max_aspect": 2.0},
    {"resolution": None},
    {"resolution": None, "max_resolution": 640, "multiple": 32, "max_aspect": 3.0},
    {"resolution": 384, "crop_to_square": True},
]


def many_sizes(count: int, smallest: int = 16) -> tuple[np.ndarray, np.ndarray]:
    dice = np.random.default_rng(0)
    width, height = (np.exp(dice.uniform(np.log(smallest), np.log(6000), count)).astype(int) for _ in range(2))
    return width, height


def twin(width: int, height: int, mapping: SizeMapping) -> tuple[int, int]:
    """Try every size in steps of `multiple` around the largest that fits; the nearest aspect wins, then the larger."""
    aspect = 1.0 if mapping.crop_to_square else mapping.max_aspect
    kept_width, kept_height = min(width, height * aspect), min(height, width * aspect)
    area = mapping.side**2
    if not mapping.upscale:
        area = min(area, kept_width * kept_height)
    ideal_width = math.sqrt(area * kept_width / kept_height)
    ideal_height = math.sqrt(area * kept_height / kept_width)
    options = []
    for w in range(mapping.multiple, int(ideal_width) + 2 * mapping.multiple, mapping.multiple):
        for h in range(mapping.multiple, int(ideal_height) + 2 * mapping.multiple, mapping.multiple):
            near = max(abs(w - ideal_width), abs(h - ideal_height)) < mapping.multiple - 1e-6
            grown = not mapping.upscale and (w > kept_width or h > kept_height)
            if near and not grown and w * h <= mapping.side**2:
                distance = abs(math.log(w / h) - math.log(kept_width / kept_height))
                options.append((round(distance, 9), -w * h, w, h))
    *_, w, h = min(options)
    return min(w, math.floor(h * aspect / mapping.multiple + 1e-9) * mapping.multiple), min(
        h, math.floor(w * aspect / mapping.multiple + 1e-9) * mapping.multiple
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_sizes_are_those_of_the_twin(settings: dict[str, Any]) -> None:
    mapping = SizeMapping(**settings)
    width, height = many_sizes(150, smallest=mapping.multiple * 4)
    found = np.stack(mapping(width, height), axis=1).tolist()
    assert found == [list(twin(w, h, mapping)) for w, h in zip(width.tolist(), height.tolist(), strict=True)]


@pytest.mark.parametrize("settings", SETTINGS)
def test_sizes_hold_their_promises(settings: dict[str, Any]) -> None:
    mapping = SizeMapping(**settings)
    width, height = many_sizes(20_000)
    new_width, new_height = mapping(width, height)
    assert new_width.min() >= mapping.multiple and new_height.min() >= mapping.multiple
    assert not (new_width % mapping.multiple).any() and not (new_height % mapping.multiple).any()
    assert (new_width * new_height <= mapping.side**2).all()
    limit = 1 if mapping.crop_to_square else mapping.max_aspect
    assert (np.maximum(new_width / new_height, new_height / new_width) <= limit).all()
    if not mapping.upscale:
        assert (new_width <= np.maximum(width, mapping.multiple)).all()
        assert (new_height <= np.maximum(height, mapping.multiple)).all()
    turned_height, turned_width = mapping(height, width)
    if not mapping.crop_to_square:
        assert np.array_equal(turned_width, new_width) and np.array_equal(turned_height, new_height)


def test_area_and_aspect_are_near_what_was_asked() -> None:
    """From 256 to 2048, photographs lose at most a step of a side to rounding."""
    width, height = many_sizes(5_000, smallest=3000)
    for resolution in (256, 512, 1024, 2048):
        new_width, new_height = SizeMapping(resolution=resolution)(width, height)
        step = 16 * np.maximum(1 / new_width, 1 / new_height)
        assert (new_width * new_height / resolution**2 > (1 - step) ** 2).all()
        assert (np.abs(np.log(new_width / new_height) - np.log(width / height)) <= np.log1p(step)).all()


def test_well_known_sizes() -> None:
    def size(width: int, height: int, **settings: Any) -> tuple[int, int]:
        new_width, new_height = SizeMapping(**settings)(width, height)
        return int(new_width), int(new_height)

    assert size(1024, 1024) == (1024, 1024)
    assert size(4000, 4000) == (1024, 1024)
    assert size(6000, 4000) == (1248, 832)  # 3:2 exactly
    assert size(4000, 3000, resolution=2048) == (2352, 1760)  # 2368 x 1776 would be 4:3 and too large
    assert size(500, 400) == (496, 400)  # never enlarged, a few pixels cropped
    assert size(500, 400, upscale=True) == (1136, 912)
    assert size(500, 400, crop_to_square=True) == (400, 400)
    assert size(10_000, 100) == (384, 96)  # the ends are cropped to 4:1
    assert size(0, 0) == (0, 0)
    assert size(64, 64) == (64, 64)
    assert size(7, 9) == (16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multiple": 24}, r"sizes.multiple is 24: set it to a multiple of 16\."),
        ({"max_aspect": 0.5}, r"sizes.max_aspect is 0.5: set it to a number from 1 up\."),
        ({"resolution": None, "upscale": True}, r"sizes.upscale needs a size to enlarge to"),
        ({"resolution": 60, "multiple": 32}, r"sizes.resolution is 60, .* set it to 64 or more\."),
        ({"resolution": None, "max_resolution": 20}, r"sizes.max_resolution is 20, .* set it to 32 or more\."),
    ],
)
def test_settings_that_cannot_be_met_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SizeMapping(**settings)


def test_resizing_covers_the_size_and_crops_the_middle() -> None:
    """A horizontal ramp: what is left of it says which part of the picture was taken."""
    ramp = np.repeat(np.linspace(0, 255, 400)[None, :, None], 100, axis=0).repeat(3, axis=2).astype(np.uint8)
    whole = resize_to(ramp, 200, 50)
    assert whole.shape == (50, 200, 3) and whole.dtype == np.uint8
    assert whole[25, 0, 0] <= 2 and whole[25, -1, 0] >= 253
    middle = resize_to(ramp, 100, 50)  # the middle half of the ramp
    assert abs(int(middle[25, 0, 0]) - 64) <= 2 and abs(int(middle[25, -1, 0]) - 191) <= 2
    tall = resize_to(ramp, 16, 64)  # a window of 25 of the 400 columns
    assert np.ptp(tall[32, :, 0]) <= 20 and abs(tall[32, :, 0].mean() - 127.5) <= 2


@pytest.mark.parametrize("size", [(1000, 700), (333, 500), (130, 90), (97, 64)])
def test_both_ways_of_scaling_give_the_same_picture(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's Lanczos, and Pillow's where torch has none."""
    if not buckets.torch_has_lanczos():
        pytest.skip("this torch cannot scale by Lanczos")
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 3, size[0] // 3, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(noise).resize(size))
    by_torch = resize_to(image, 112, 80)
    monkeypatch.setattr(buckets, "torch_has_lanczos", lambda: False)
    assert np.abs(resize_to(image, 112, 80).astype(int) - by_torch).max() <= 2


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    assert resize_to(image, 48, 32) is image


def test_a_flat_picture_stays_flat_at_any_scale() -> None:
    mapping = SizeMapping(resolution=48, max_aspect=3.0, upscale=True)
    for height in range(15, 240, 7):
        for width in range(15, 240, 9):
            new_width, new_height = (int(side) for side in mapping(width, height))
            resized = resize_to(np.full((height, width, 3), 77, dtype=np.uint8), new_width, new_height)
            assert resized.shape == (new_height, new_width, 3) and (resized == 77).all()


def test_tokens_of_a_size() -> None:
    assert image_tokens(1024, 1024) == 4096
    assert image_tokens([1248, 0], [832, 0]).tolist() == [78 * 52, 0]
    assert image_tokens(64, 64, patch_pixels=8) == 64
