"""A small prepared data set whose pictures, captions and sizes are known."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import pytest
from PIL import Image

from data_modules.manifest import write_manifest
from data_modules.samples import encode_sample

NUM_SAMPLES = 44
CHUNK_SIZE = 10
KINDS = {"en": ["long", "short"], "zh": ["short"]}


def noise(index: int) -> np.ndarray:
    """Noise, uint8 (H, W, 3), of a size that depends on the index."""
    height, width = 8 + index % 3, 8 + index % 2
    return np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stored_sample(index: int) -> dict[str, Any]:
    """Sample number `index`; every fourth is a JPEG file, kept as it is."""
    image: np.ndarray | bytes = noise(index)
    if index % 4 == 0:
        buffer = io.BytesIO()
        Image.fromarray(noise(index)).save(buffer, "JPEG")
        image = buffer.getvalue()
    captions = {language: {kind: f"{language} {kind} {index}" for kind in kinds} for language, kinds in KINDS.items()}
    return encode_sample(image, captions, {"tag": "noise", "number": index}, f"id-{index}")


def write_split(folder: Path, size: int, sample: Callable[[int], dict[str, Any]] = stored_sample) -> None:
    litdata.optimize(
        sample,
        inputs=list(range(size)),
        output_dir=str(folder),
        chunk_size=CHUNK_SIZE,
        keep_data_ordered=True,
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


@pytest.fixture
def pixels() -> Callable[[int], np.ndarray]:
    """The picture of a sample, uint8 (H, W, 3)."""
    return noise


@pytest.fixture(scope="session")
def noise_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared once; tests that change files take a `noise_copy`."""
    folder = tmp_path_factory.mktemp("noise") / "data"
    write_split(folder / "train", NUM_SAMPLES)
    write_split(folder / "val", 7)
    write_manifest(folder, "noise", {"train": NUM_SAMPLES, "val": 7}, KINDS, {})
    return folder


@pytest.fixture
def noise_copy(noise_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(noise_folder, tmp_path / "copy"))


SIZED = 60  # samples of the sized data set


def sized_picture(index: int) -> np.ndarray:
    """Noise, uint8 (H, W, 3), of 40 to 220 pixels a side."""
    dice = np.random.default_rng(index)
    height, width = dice.choice([40, 64, 100, 128, 220], 2)
    return dice.integers(0, 256, (height, width, 3), dtype=np.uint8)


def sized_sample(index: int) -> dict[str, Any]:
    return encode_sample(sized_picture(index), {"en": {"short": f"caption {index}"}}, {"number": index}, index)


@pytest.fixture
def sized_pixels() -> Callable[[int], np.ndarray]:
    return sized_picture


@pytest.fixture(scope="session")
def sized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pictures of many sizes with planning.npz; of every three samples one is a cat, one a dog, one neither."""
    folder = tmp_path_factory.mktemp("sized") / "data"
    write_split(folder / "train", SIZED, sized_sample)
    shapes = np.array([sized_picture(index).shape for index in range(SIZED)])
    np.savez(
        folder / "train" / "planning.npz",
        width=shapes[:, 1].astype(np.uint16),
        height=shapes[:, 0].astype(np.uint16),
        caption_tokens=np.random.default_rng(0).integers(8, 200, SIZED).astype(np.uint16),
        concept=(np.arange(SIZED) % 3 - 1).astype(np.int32),
    )
    write_manifest(folder, "sized", {"train": SIZED}, {"en": ["short"]}, {"concepts": ["cat", "dog"]})
    return folder
