"""The benchmarks' official files and golden vectors, which stand beside the repository: tests skip without them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = Path(os.environ.get("ZIMAGE_LIT_BENCHMARKS", ROOT.parent / "shared" / "benchmarks"))


def golden(name: str) -> Any:
    """The golden vectors of a file, `cvtg2k/ocr_vectors.json` say: what the published code gives."""
    path = BENCHMARKS / "golden" / name
    if not path.is_file():
        pytest.skip(f"there is no {path}: name the folder of the golden vectors as ZIMAGE_LIT_BENCHMARKS")
    return json.loads(path.read_text(encoding="utf-8"))


def official(name: str) -> Path:
    """The folder of a benchmark's official files."""
    path = BENCHMARKS / "data" / name
    if not path.is_dir():
        pytest.skip(f"there is no {path}: name the folder of the official files as ZIMAGE_LIT_BENCHMARKS")
    return path


def agrees(verdict: dict[str, Any], case: dict[str, Any]) -> bool:
    """Whether a verdict has what a golden case has, for all that it has."""
    return all(case[field] == value for field, value in verdict.items() if field in case)
