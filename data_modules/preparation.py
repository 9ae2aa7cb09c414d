"""`lightning run prepare`: raw data of any kind to a prepared data set, checked, hashed and ready to be streamed.

The source is cut into parts of a fixed number of records; processes check and write them one by one, each into a folder
of its own below `.parts`. What is written depends on the source and the settings alone. So the files are the same
whatever the number of processes, and a preparation that was killed goes on with the parts that are missing. In the end
the chunks are moved to where they belong and the manifest is written.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data_modules.assembly import assemble_split
from data_modules.balancing import collect_tags, tags_file
from data_modules.folder_lock import GO_ON, PARTS, begin_or_go_on, clean_up, is_prepared, sole_preparation
from data_modules.images import LARGEST
from data_modules.manifest import Manifest, read_manifest, write_manifest
from data_modules.part_writer import (
    SUMMARY,
    UNFINISHED,
    Job,
    PartSummary,
    Rules,
    read_summary,
    start_worker,
    write_part,
)
from data_modules.progress import counter_progress
from data_modules.sources import Format, Source, open_source
from zimage_lit.config import settings_from
from zimage_lit.errors import UserError, at_least_one
from zimage_lit.files import write_atomically

FOLDER_KEY = "output"
REJECTED = "rejected.jsonl"
REPORT = "preparation.json"


@dataclass(frozen=True)
class PrepareSettings:
    """Settings of `lightning run prepare`."""

    source: str  # a folder of pictures, a .jsonl, .csv or .parquet file, .tar files, a Hugging Face datasets folder
    output: str  # folder for the prepared data set
    name: str | None = None  # of the data set; the name of the output folder
    format: Format | None = None  # what to take the source for, where that is not plain
    columns: dict[str, Any] | None = None  # what stands where: columns.image=file columns.caption.en.long=description
    language: str = "en"  # of captions that do not say theirs
    tokenizer: str | None = None  # a text encoder's folder, to count the tokens of captions; else they are estimated
    val_share: float = 0.0  # share of the samples that goes to the validation split
    min_side: int = 64  # pixels of the shorter side; smaller pictures are rejected
    max_pixels: int = LARGEST  # of a whole picture; larger ones are rejected
    max_caption_length: int = 8000  # characters; samples with a longer caption are rejected
    part_size: int = 1000  # records that are prepared together: what a kill can cost, and what a process does at a time
    chunk_mib: int = 64  # MiB, size of the stored files
    num_workers: int | None = None  # processes; one for each core


def prepare_task(settings: dict[str, Any]) -> None:
    """`lightning run prepare`."""
    prepare(settings_from(PrepareSettings, settings))


def prepare(asked: PrepareSettings) -> Manifest:
    """Prepare a source; returns at once where the same was prepared before, waits where it is being prepared.

    Prints a table of what came in, what went out, and why the rest did not.

    Raises:
        UserError: wrong settings; a source that is missing or not recognised; an output folder that holds other files,
            another data set or an unfinished one of other settings; no sample left; a disk that cannot be read or
            written, and workers that were killed (both can be continued).
    """
    _check(asked)
    output = Path(asked.output)
    source = open_source(asked.source, asked.part_size, asked.format, asked.columns, asked.language)
    settings = _stored_settings(asked, source)
    if not is_prepared(output, settings, FOLDER_KEY):
        with sole_preparation(output, FOLDER_KEY):
            if not is_prepared(output, settings, FOLDER_KEY):  # the one that was waited for may have done it
                try:
                    return _prepare(asked, output, source, settings)
                except KeyboardInterrupt:
                    Console(stderr=True).print(f"{output}: {GO_ON}", highlight=False, soft_wrap=True)
                    raise
                except OSError as error:
                    raise UserError(f"The preparation of {output} stopped ({error}): mend that; {GO_ON}.") from error
    clean_up(output, output / PARTS)
    Console().print(f"{output} is prepared already", highlight=False, soft_wrap=True)
    return read_manifest(output)


def _check(asked: PrepareSettings) -> None:
    for key in ("min_side", "max_pixels", "max_caption_length", "part_size", "chunk_mib"):
        at_least_one(key, getattr(asked, key))
    if asked.num_workers is not None:
        at_least_one("num_workers", asked.num_workers)
    if not 0 <= asked.val_share < 1:
        raise UserError(f"val_share must be from 0 to below 1, not {asked.val_share}.")
    if asked.chunk_mib > 2048:
        raise UserError(f"chunk_mib must be at most 2048, not {asked.chunk_mib}.")
    source, output = Path(asked.source).resolve(), Path(asked.output).resolve()
    if output.is_relative_to(source):
        raise UserError(f"output={asked.output} lies in the source {asked.source}: name a folder outside it.")


def _stored_settings(asked: PrepareSettings, source: Source) -> dict[str, Any]:
    """What decides the prepared files, as the manifest keeps it; the source by what it holds, not by where it lies."""
    settings = asdict(asked)
    for name in ("source", "output", "num_workers"):
        del settings[name]
    name = asked.name or Path(asked.output).resolve().name
    return settings | {
        "name": name,
        "format": source.format,
        "roles": source.roles,
        "source_listing": source.listing[:16],
    }


# ---------------------------------------------------------------------------------------------------- parts


def _prepare(asked: PrepareSettings, output: Path, source: Source, settings: dict[str, Any]) -> Manifest:
    parts_dir = output / PARTS
    begin_or_go_on(parts_dir, settings, FOLDER_KEY)
    _clear_unfinished(parts_dir)
    rules = Rules(
        asked.min_side,
        asked.max_pixels,
        asked.max_caption_length,
        asked.val_share,
        asked.chunk_mib * 2**20,
        asked.tokenizer,
    )
    folders = [parts_dir / f"{number:06d}" for number in range(len(source.parts))]
    jobs = [Job(part, folder, rules) for part, folder in zip(source.parts, folders, strict=True)]
    missing = [job for job in jobs if not (job.folder / SUMMARY).is_file()]
    _run(missing, asked.num_workers, f"Preparing {settings['name']}", source.num_records)
    again = [
        Job(jobs[number].part, jobs[number].folder, rules, frozenset(duplicates))
        for number, duplicates in _duplicates(folders).items()
    ]
    _run(again, asked.num_workers, "Removing duplicate ids", sum(job.part.count for job in again))
    return _assemble(output, folders, settings)


def _clear_unfinished(parts_dir: Path) -> None:
    for left_behind in parts_dir.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left_behind, ignore_errors=True)


def _run(jobs: list[Job], num_workers: int | None, label: str, total: int) -> None:
    """Write parts, in processes. Raises what went wrong first, when no process writes any more."""
    if not jobs:
        return
    context = multiprocessing.get_context()
    done, stop = context.Value("q", total - sum(job.part.count for job in jobs)), context.RawValue("b", 0)
    workers = min(num_workers or os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(done, stop)) as pool:
        futures = [pool.submit(write_part, job) for job in jobs]  # before the bar: no process is to inherit its thread
        try:
            with counter_progress(label, total, done):
                for future in as_completed(futures):
                    future.result()
        except BaseException as error:
            stop.value = 1
            pool.shutdown(cancel_futures=True)
            _clear_unfinished(jobs[0].folder.parent)
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    "A process of the preparation was killed, perhaps for want of memory: give a smaller num_workers; "
                    f"{GO_ON}."
                ) from None
            raise


def _duplicates(folders: list[Path]) -> dict[int, set[int]]:
    """Part -> numbers of its records whose ids an earlier sample has. Of the first it does not matter where it went."""
    hashes: list[np.ndarray] = []  # 8 bytes an id: among 10**7 ids two differ and agree in them once in 400,000 times
    for folder in folders:
        ids = [row[1] for row in _rows(read_summary(folder))]
        digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in ids)
        hashes.append(np.frombuffer(digests, dtype="<u8"))
    together = np.concatenate(hashes)
    order = np.argsort(together, kind="stable")
    later = order[1:][together[order][1:] == together[order][:-1]]
    ends = np.cumsum([len(part) for part in hashes])
    found: dict[int, set[int]] = {}
    for position in np.sort(later).tolist():
        part = int(np.searchsorted(ends, position, side="right"))
        row = _rows_of(folders[part])[position - int(ends[part]) + len(hashes[part])]
        found.setdefault(part, set()).add(row[0])
    return found


@lru_cache(maxsize=1)  # duplicates are looked up part by part
def _rows_of(folder: Path) -> list[list[Any]]:
    return _rows(read_summary(folder))


def _rows(summary: PartSummary) -> list[list[Any]]:
    """The samples of all splits in the order of the records."""
    return sorted((row for rows in summary.samples.values() for row in rows), key=lambda row: row[0])


# ---------------------------------------------------------------------------------------------------- the data set


def _assemble(output: Path, folders: list[Path], settings: dict[str, Any]) -> Manifest:
    """Move the chunks to their splits, describe them, and write the manifest. Every step can be done twice."""
    report, caption_sets, concepts = _sum_up(output, folders)
    _show(report, output)
    if not report["prepared"].get("train"):
        shutil.rmtree(output / PARTS)
        way_out = "lower val_share" if report["prepared"] else f"{output / REJECTED} says why"
        raise UserError(f"{output} has no sample to train on: {way_out}.")
    hashes = {}
    for split in report["prepared"]:
        hashes.update(_assemble_split(output, split, folders, concepts))
    settings = {**settings, "concepts": concepts, "caption_sets": caption_sets}
    manifest = write_manifest(output, settings["name"], report["prepared"], _kinds(caption_sets), settings, hashes)
    shutil.rmtree(output / PARTS, ignore_errors=True)
    return manifest


def _sum_up(output: Path, folders: list[Path]) -> tuple[dict[str, Any], dict[str, int], list[str]]:
    """Write rejected.jsonl and preparation.json; gives (the report, the sets of captions, the concepts)."""
    prepared: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    caption_sets: Counter[str] = Counter()
    concepts: set[str] = set()
    records = 0
    with (output / REJECTED).open("w", encoding="utf-8") as stream:
        for summary in map(read_summary, folders):
            records += summary.count
            for split, rows in summary.samples.items():
                prepared[split] += len(rows)
                concepts.update(row[5] for row in rows if row[5] is not None)
            for place, reason in summary.rejected:
                rejected[reason.partition(":")[0]] += 1
                stream.write(json.dumps({"source": place, "reason": reason}, ensure_ascii=False) + "\n")
            caption_sets.update(summary.caption_sets)
    report = {
        "records": records,
        "prepared": {split: prepared[split] for split in ("train", "val") if prepared[split]},
        "rejected": dict(sorted(rejected.items())),
    }
    write_atomically(output / REPORT, json.dumps(report, indent=1, ensure_ascii=False))
    return report, dict(sorted(caption_sets.items())), sorted(concepts)


def _kinds(caption_sets: Mapping[str, int]) -> dict[str, list[str]]:
    """Language -> kinds, of all captions that any sample has."""
    names = sorted({(language, kind) for captions in caption_sets for language, kind in json.loads(captions)})
    return {language: [kind for _, kind in group] for language, group in groupby(names, key=itemgetter(0))}


def _assemble_split(output: Path, split: str, folders: list[Path], concepts: list[str]) -> dict[str, str]:
    """The files of a split; gives the SHA-256 of the chunks by their paths."""
    places = {concept: number for number, concept in enumerate(concepts)}
    parts: list[tuple[Path, list[dict[str, Any]]]] = []
    config: dict[str, Any] | None = None
    columns: list[np.ndarray] = []
    for part in folders:
        summary = read_summary(part)
        config = config or summary.config
        rows = [[*row[2:5], -1 if row[5] is None else places[row[5]]] for row in summary.samples[split]]
        columns.append(np.array(rows, dtype=np.int64).reshape(-1, 4))
        parts.append((part / split, summary.chunks[split]))
    tags = collect_tags(row[6] for part in folders for row in read_summary(part).samples[split])
    described = np.concatenate(columns)
    return assemble_split(output / split, parts, config, described, tags_file(tags) if tags.names else None)


def _show(report: dict[str, Any], output: Path) -> None:
    """The table at the end."""
    table = Table("", "records", show_edge=False)
    table.columns[1].justify = "right"
    table.add_row("came in", f"{report['records']:,}", end_section=True)
    for split, size in report["prepared"].items():
        table.add_row(split, f"{size:,}")
    table.add_section()
    for reason, size in sorted(report["rejected"].items(), key=lambda entry: -entry[1]):
        table.add_row(f"rejected, {reason}", f"{size:,}")
    console = Console()
    console.print(f"Prepared in {output}", highlight=False, soft_wrap=True)
    console.print(table)
    if report["rejected"]:
        console.print(f"each one by name in {output / REJECTED}", highlight=False, soft_wrap=True)
