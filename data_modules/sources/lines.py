"""Manifests of lines: JSONL, CSV and TSV."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data_modules.images import Rejected
from data_modules.sources.parts import Format, Part, Source, listing, parse_object, printable, row_record
from data_modules.sources.records import Columns, Record, Rejection
from zimage_lit.errors import UserError


@dataclass(frozen=True)
class LinesPart:
    """Records of a manifest of lines, from a byte and line number on."""

    path: Path
    offset: int
    line: int  # that begins at `offset`, counted from 1
    count: int
    header: tuple[str, ...] | None  # of a CSV file; None for JSONL
    columns: Columns

    def records(self) -> Iterator[Record | Rejection]:
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            for line, row in islice(self._rows(stream), self.count):
                place = f"{printable(self.path.name)}:{line}"
                try:
                    yield row_record(place, row(), self.columns, self.path.parent)
                except Rejected as reason:
                    yield Rejection(place, str(reason))

    def _rows(self, stream: Iterable[bytes]) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
        """(line number, what gives the fields or raises Rejected) of each row."""
        if self.header is not None:
            for line, _, row in _csv_rows(stream, self.path, self.line):
                yield line, partial(_csv_fields, row, self.header)
        else:
            for line, _, content in _json_rows(stream, self.line):
                yield line, partial(parse_object, content, "record")


def _json_rows(stream: Iterable[bytes], line: int = 1) -> Iterator[tuple[int, int, bytes]]:
    """(line number, bytes before it, content) of every line that is not blank."""
    start = 0
    for number, content in enumerate(stream, line):
        if content.strip():
            yield number, start, content
        start += len(content)


def _csv_rows(stream: Iterable[bytes], path: Path, line: int = 1) -> Iterator[tuple[int, int, list[str] | csv.Error]]:
    """(number of its first line, bytes before it, fields or what is wrong) of every row; one may span lines."""
    next_start, next_line = 0, line

    def lines() -> Iterator[str]:
        nonlocal next_start, next_line
        for content in stream:
            next_start += len(content)
            next_line += 1
            yield content.decode("utf-8-sig" if next_line == 2 else "utf-8", "surrogateescape")

    rows = csv.reader(lines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    while True:
        number, start = next_line, next_start
        try:
            row: list[str] | csv.Error = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            row = error
        if row:
            yield number, start, row


def _csv_fields(row: list[str] | csv.Error, header: Sequence[str]) -> dict[str, Any]:
    if isinstance(row, csv.Error):
        raise Rejected(f"unreadable record: {row}")
    if len(row) != len(header):
        raise Rejected(f"unreadable record: {len(row)} fields where the header has {len(header)}")
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        raise Rejected("unreadable record: it is not UTF-8") from None
    return dict(zip(header, row, strict=True))


def open_jsonl(path: Path, part_size: int, columns: Columns) -> Source:
    names: dict[str, None] = {}
    with path.open("rb") as stream:
        for _, _, content in _json_rows(stream):  # all: a manifest may be sorted by language or by source
            try:
                names.update(dict.fromkeys(parse_object(content, "record")))
            except Rejected:
                continue  # it will be named when its turn comes
    if not names:
        raise UserError(f"{path} holds no JSON object on any of its lines: correct source=… or format=….")
    columns = columns.of_table(list(names), str(path))
    with path.open("rb") as stream:
        return _lines_source("jsonl", path, part_size, columns, None, _json_rows(stream))


def open_csv(path: Path, part_size: int, columns: Columns) -> Source:
    with path.open("rb") as stream:
        rows = _csv_rows(stream, path)
        _, _, header = next(rows, (1, 0, []))
        if isinstance(header, csv.Error) or not header:
            raise UserError(f"{path} has no header, the line with the names of its columns: add one.")
        columns = columns.of_table(header, str(path))
        return _lines_source("csv", path, part_size, columns, tuple(header), rows)


def _lines_source(
    format: Format,
    path: Path,
    part_size: int,
    columns: Columns,
    header: tuple[str, ...] | None,
    rows: Iterator[tuple[int, int, Any]],
) -> Source:
    """Note where every part begins."""
    parts: list[Part] = []
    while block := list(islice(((line, start) for line, start, _ in rows), part_size)):
        line, start = block[0]
        parts.append(LinesPart(path, start, line, len(block), header, columns))
    return Source(format, columns.roles, parts, listing(path.parent, [path.name]))
