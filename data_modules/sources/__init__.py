"""Raw data as people have it, read as records in a fixed order, in parts that workers can read by themselves.

A source is a folder of pictures with sidecars, a manifest (JSONL, CSV, Parquet), WebDataset tars, or a folder that the
Hugging Face `datasets` library saved. `open_source` looks at it once and notes where each part of so many records
begins; no more than that is held in memory, and no picture is opened.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa

from data_modules.sources.arrow import open_huggingface, open_parquet
from data_modules.sources.folder import open_folder
from data_modules.sources.lines import open_csv, open_jsonl
from data_modules.sources.parts import PICTURES, Format, Part, Source, files_below
from data_modules.sources.records import Columns, Record, Rejection
from data_modules.sources.tars import open_webdataset
from zimage_lit.errors import UserError

__all__ = ["Format", "Part", "Record", "Rejection", "Source", "open_source", "recognise"]

OPENERS: dict[Format, Callable[[Path, int, Columns], Source]] = {
    "folder": open_folder,
    "jsonl": open_jsonl,
    "csv": open_csv,
    "parquet": open_parquet,
    "webdataset": open_webdataset,
    "huggingface": open_huggingface,
}
FILES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".tar": "webdataset",
}


def open_source(
    path: str | Path,
    part_size: int = 1000,
    format: Format | None = None,
    columns: Mapping[str, Any] | None = None,
    language: str = "en",
) -> Source:
    """Recognise a source and divide it into parts of `part_size` records (the last of each file may be shorter).

    format: what the source is to be taken for; None: what it looks like.
    columns: what is wanted -> the name it has there, such as {"image": "file", "caption.en.long": "description"}; None
        as a name leaves a column of that name to the metadata. See `records.TARGETS`.
    language: of captions that do not say theirs.
    Raises UserError for a source that is missing, empty or not recognised, and for columns that it does not have.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no source {path}: correct source=….")
    if format is not None and format not in get_args(Format):
        raise UserError(f"format={format} is not known: take one of {', '.join(get_args(Format))}.")
    format = format or recognise(path)
    wanted = Columns.asked_for(columns, language)
    try:
        source = OPENERS[format](path, part_size, wanted)
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"The source {path} cannot be read as {format} ({error}): mend it, or give format=…."
        ) from error
    if not source.parts:
        raise UserError(f"The source {path}, read as {format}, holds no records: correct source=… or format=….")
    return source


def recognise(path: Path) -> Format:
    """What the source is, by what is there. UserError where that is nothing known, or more than one thing."""
    if path.is_file():
        if path.suffix.lower() not in FILES:
            raise UserError(
                f"The source {path} is no file of a known kind ({', '.join(FILES)}): give a folder or such a file, "
                "or say what it is with format=…."
            )
        return FILES[path.suffix.lower()]
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return "huggingface"
    found: dict[Format, str] = {}  # the first file of each kind
    for name in files_below(path):
        ending = Path(name).suffix.lower()
        kind = FILES.get(ending, "folder" if ending in PICTURES else None)
        if kind in ("jsonl", "csv") and "/" not in name:
            raise UserError(
                f"The source {path} holds {name}: give that file as source=…, or format=folder to take the pictures "
                "with their sidecars."
            )
        if kind in ("folder", "webdataset", "parquet"):
            found.setdefault(kind, name)
    if len(found) != 1:
        what = (
            f"holds several kinds of sources ({', '.join(found.values())})"
            if found
            else "holds nothing that can be read"
        )
        raise UserError(f"The source {path} {what}: correct source=…, or say what to take with format=….")
    return next(iter(found))
