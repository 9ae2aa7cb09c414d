"""What `lightning run evaluate` does beside benchmarks: models side by side, distances to real pictures, votes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from evaluation.fidelity.image_quality import FidelitySettings, fidelity
from evaluation.preference.task import preference
from evaluation.report.write import write_report
from zimage_lit.config import settings_from
from zimage_lit.files import write_atomically


@dataclass(frozen=True)
class CompareTaskSettings:
    """Settings of `lightning run evaluate benchmark=compare`."""

    benchmark: str
    results: list[str]  # folders with a result.json; differences are from the model that comes first
    output: str = "outputs/evaluation/compare"  # gets report.html, .md and .json


@dataclass(frozen=True)
class FidelityTaskSettings:
    """Settings of `lightning run evaluate benchmark=fidelity`."""

    benchmark: str
    images: str  # folder of drawn pictures, of any depth
    reference: str  # folder of real ones
    inception: str | None = None  # torch-fidelity's weights file of its Inception network
    output: str = "outputs/evaluation"  # fidelity/ below it gets fidelity.json
    resize: int | None = None  # pixels a side that all pictures are brought to; null: as they are
    isc_splits: int = 10  # parts over which the Inception score is a mean
    kid_subsets: int = 100  # random subsets over which KID is a mean
    kid_subset_size: int = 1000  # pictures in one
    device: str | None = None  # cpu, cuda, …; a GPU where there is one


@dataclass(frozen=True)
class PreferenceTaskSettings:
    """Settings of `lightning run evaluate benchmark=preference`."""

    benchmark: str
    votes: str  # file with a vote a line
    output: str = "outputs/evaluation"  # preference/ below it gets preference.json, .md and .html
    resamples: int = 1000  # of the bootstrap, for intervals
    seed: int = 0  # of the bootstrap


def compare_task(settings: dict[str, Any]) -> None:
    """Put results side by side; UserError as `write_report` has it."""
    asked = settings_from(CompareTaskSettings, settings)
    say(str(write_report([Path(folder) for folder in asked.results], Path(asked.output))))


def fidelity_task(settings: dict[str, Any]) -> None:
    """Measure and write; UserError as `image_quality.fidelity` has it."""
    asked = settings_from(FidelityTaskSettings, settings)
    details = FidelitySettings(
        resize=asked.resize,
        isc_splits=asked.isc_splits,
        kid_subsets=asked.kid_subsets,
        kid_subset_size=asked.kid_subset_size,
    )
    inception = Path(asked.inception) if asked.inception else None
    result = fidelity(Path(asked.images), Path(asked.reference), inception, details, device=asked.device)
    path = Path(asked.output) / "fidelity" / "fidelity.json"
    write_atomically(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    shown = ", ".join(f"{name} {metric['value']:.4f}" for name, metric in result["metrics"].items())
    say(f"{shown}: {path}", *result["notes"], *result["comparable"]["reasons"])


def preference_task(settings: dict[str, Any]) -> None:
    """Rate and write; UserError as `preference` has it."""
    asked = settings_from(PreferenceTaskSettings, settings)
    output = Path(asked.output) / "preference"
    result = preference(Path(asked.votes), output, asked.resamples, asked.seed)
    ratings = [f"{one['model']} {one['rating']:.0f}" for one in result["ratings"]]
    say(f"{', '.join(ratings)}: {output / 'preference.html'}")


def say(*lines: str) -> None:
    for line in lines:
        Console().print(line, highlight=False, soft_wrap=True, markup=False)
