"""Tables of Arrow: Parquet files, and what the Hugging Face `datasets` library saves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_modules.images import Rejected
from data_modules.sources.parts import Format, Part, Source, files_below, listing, printable, row_record
from data_modules.sources.records import Columns, Record, Rejection
from zimage_lit.errors import UserError
from zimage_lit.files import read_json

ROWS_AT_ONCE = 16  # rows of an Arrow table that are turned into Python objects together; each may hold a picture


@dataclass(frozen=True)
class ArrowPart:
    """Rows `start` to `start + count` of a Parquet row group or of an Arrow stream (row_group None)."""

    folder: Path
    name: str
    row_group: int | None
    start: int
    count: int
    first_row: int  # of the row group in its file
    columns: Columns
    read: tuple[str, ...]  # names of the columns that are read

    def records(self) -> Iterator[Record | Rejection]:
        row = self.first_row + self.start
        for fields in self._rows():
            place = f"{printable(self.name)}:{row}"
            row += 1
            try:
                yield row_record(place, fields, self.columns, (self.folder / self.name).parent)
            except Rejected as reason:
                yield Rejection(place, str(reason))

    def _rows(self) -> Iterator[dict[str, Any]]:
        skip, left = self.start, self.count
        for batch in self._batches():
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            taken = batch.slice(skip, left)
            skip, left = 0, left - taken.num_rows
            for start in range(0, taken.num_rows, ROWS_AT_ONCE):
                yield from taken.slice(start, ROWS_AT_ONCE).to_pylist()
            if not left:
                return

    def _batches(self) -> Iterator[pa.RecordBatch]:
        path = self.folder / self.name
        if self.row_group is not None:
            with pq.ParquetFile(path) as table:
                yield from table.iter_batches(ROWS_AT_ONCE, row_groups=[self.row_group], columns=list(self.read))
        else:
            with pa.memory_map(str(path)) as stream, pa.ipc.open_stream(stream) as reader:
                for batch in reader:
                    yield batch.select(list(self.read))


def open_parquet(path: Path, part_size: int, columns: Columns) -> Source:
    folder, names = (path, list(files_below(path, (".parquet",)))) if path.is_dir() else (path.parent, [path.name])
    groups = []
    schema: pa.Schema = None
    for name in names:
        with pq.ParquetFile(folder / name) as table:
            schema = _same_schema(schema, table.schema_arrow, folder / name)
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
        groups += [(name, group, size, sum(sizes[:group])) for group, size in enumerate(sizes)]
    return _arrow_source("parquet", folder, names, groups, schema, part_size, columns)


def open_huggingface(path: Path, part_size: int, columns: Columns) -> Source:
    """`Dataset.save_to_disk` wrote state.json and Arrow streams; `DatasetDict` a folder of those for each split."""
    if not path.is_dir():
        raise UserError(f"format=huggingface needs a folder, and {path} is a file: correct source=… or format=….")
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json").get("splits", [])
        if len(splits) != 1:
            raise UserError(
                f"The source {path} has the splits {', '.join(splits)}: name one of them, such as "
                f"source={path / (splits or ['train'])[0]}."
            )
        path = path / splits[0]
    if not (path / "state.json").is_file():
        return open_parquet(path, part_size, columns)
    names = [str(entry["filename"]) for entry in read_json(path / "state.json").get("_data_files") or []]
    streams = []
    schema: pa.Schema = None
    for name in names:
        if not (path / name).is_file():
            raise UserError(f"{path / name}, which state.json names, is missing: copy the source again.")
        with pa.memory_map(str(path / name)) as stream, pa.ipc.open_stream(stream) as reader:
            schema = _same_schema(schema, reader.schema, path / name)
            streams.append((name, None, sum(batch.num_rows for batch in reader), 0))
    return _arrow_source("huggingface", path, names, streams, schema, part_size, columns)


def _arrow_source(
    format: Format,
    folder: Path,
    names: list[str],
    tables: Sequence[tuple[str, int | None, int, int]],
    schema: pa.Schema,
    part_size: int,
    columns: Columns,
) -> Source:
    """Parts of the (file, row group, rows, first row) in `tables`; a part never reaches into a second one."""
    if schema is None:
        raise UserError(f"The source {folder} holds no tables: correct source=….")
    pictures = [field.name for field in schema if _is_picture(field.type)]
    columns = columns.of_table(schema.names, str(folder), pictures)
    used = set(columns.names.values())
    read = tuple(field.name for field in schema if field.name in used or not _holds_bytes(field.type))
    parts: list[Part] = [
        ArrowPart(folder, name, group, start, min(part_size, size - start), first, columns, read)
        for name, group, size, first in tables
        for start in range(0, size, part_size)
    ]
    return Source(format, columns.roles, parts, listing(folder, names))


def _same_schema(before: pa.Schema | None, schema: pa.Schema, path: Path) -> pa.Schema:
    if before is not None and before.names != schema.names:
        raise UserError(
            f"{path} has the columns {', '.join(schema.names)} and the files before it {', '.join(before.names)}: "
            "prepare them one by one, or make them alike."
        )
    return before or schema


def _is_picture(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return True
    return pa.types.is_nested(kind) and any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))
