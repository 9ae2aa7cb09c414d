"""`lightning run verify`: every file of a prepared data set against the SHA-256 in its manifest."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_modules.manifest import Manifest, data_files, problem_with, read_manifest
from data_modules.remote import is_remote
from zimage_lit.config import settings_from
from zimage_lit.errors import UserError, at_least_one


@dataclass(frozen=True)
class VerifySettings:
    """Settings of `lightning run verify`."""

    data: str  # folder of a prepared data set
    num_workers: int | None = None  # files that are read at the same time; one for each core


def verify_task(settings: dict[str, Any]) -> int:
    """Name every damaged, missing or extra file, each with the way out; returns the exit code, 1 where there is any."""
    asked = settings_from(VerifySettings, settings)
    if is_remote(asked.data):
        raise UserError(
            f"verify reads a folder, not {asked.data}: run it where the files lie; in training every file behind an "
            "address is compared with its SHA-256 when it arrives."
        )
    data_dir = Path(asked.data)
    manifest = read_manifest(data_dir)
    num_workers = at_least_one("num_workers", (os.cpu_count() or 1) if asked.num_workers is None else asked.num_workers)
    problems = find_damage(data_dir, manifest, num_workers)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print(f"error: {data_dir} has {len(problems)} problem{'s' * (len(problems) > 1)}, see above", file=sys.stderr)
        return 1
    size = sum(entry["bytes"] for entry in manifest.files.values())
    print(
        f"{data_dir} is sound: {len(manifest.files)} files, {sum(manifest.splits.values()):,} samples, {size:,} bytes"
    )
    return 0


def find_damage(data_dir: Path, manifest: Manifest, num_workers: int = 1) -> list[str]:
    """A sentence for every file that is not as the manifest says, in the order of their names."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    total = sum(entry["bytes"] for entry in manifest.files.values())
    names = sorted(manifest.files)
    problems: list[str] = []
    with Progress(*columns, TimeRemainingColumn()) as progress, ThreadPoolExecutor(num_workers) as pool:
        bar = progress.add_task(f"Verifying {manifest.name}", total=total)
        # hashing lets other threads run
        judgements = pool.map(lambda name: problem_with(data_dir, name, manifest.files[name], "sha256"), names)
        for name, problem in zip(names, judgements, strict=True):
            progress.advance(bar, manifest.files[name]["bytes"])
            problems += [problem] if problem else []
    return problems + list(_extra_files(data_dir, manifest))


def _extra_files(data_dir: Path, manifest: Manifest) -> Iterator[str]:
    for name in data_files(data_dir):
        if name not in manifest.files:
            yield f"{data_dir / name} is not part of the data set: move it elsewhere or delete it."
