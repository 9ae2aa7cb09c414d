"""A small prepared data set, see noise_samples.py."""

import shutil
from pathlib import Path

import pytest
from noise_samples import KINDS, NUM_SAMPLES, write_split

from data_modules.manifest import write_manifest


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
