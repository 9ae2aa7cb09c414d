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
from data_modules.streaming import encode_sample

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


def write_split(folder: Path, size: int) -> None:
    litdata.optimize(
        stored_sample,
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
