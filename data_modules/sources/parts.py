"""What all kinds of sources share: parts of records, names of files, sidecars."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from data_modules.images import EXTENSIONS, Rejected
from data_modules.sources.records import Columns, Record, Rejection, build_record

Format = Literal["folder", "jsonl", "csv", "parquet", "webdataset", "huggingface"]
PICTURES = tuple(sorted({ending for endings in EXTENSIONS.values() for ending in endings}))
SIDECARS = (".txt", ".json")


class Part(Protocol):
    """Consecutive records of a source; small, and can be sent to another process."""

    @property
    def count(self) -> int: ...

    def records(self) -> Iterator[Record | Rejection]:
        """As many as `count`, always the same."""
        ...


@dataclass(frozen=True)
class Source:
    """What `open_source` found.

    roles: the pictures of a record, see `Record`. listing: SHA-256 over names and sizes of the source's files.
    """

    format: Format
    roles: list[str]
    parts: list[Part]
    listing: str

    @property
    def num_records(self) -> int:
        return sum(part.count for part in self.parts)


def files_below(folder: Path, endings: tuple[str, ...] = ("",)) -> Iterator[str]:
    """Paths below a folder, in the order of their names, nothing hidden; through links, but in no circle."""
    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = PurePosixPath(Path(root).relative_to(folder).as_posix())
        for name in sorted(names):
            if name.lower().endswith(endings) and not name.startswith("."):
                yield str(inside / name)


def _refuse(error: OSError) -> None:
    raise error


def listing(folder: Path, names: Iterable[str]) -> str:
    """SHA-256 over names and sizes, by which a source is known again wherever it lies."""
    digest = hashlib.sha256()
    for name in names:
        try:
            size = os.stat(folder / name).st_size
        except FileNotFoundError:  # a link to nowhere
            size = -1
        digest.update(os.fsencode(name) + b"\0%d\n" % size)
    return digest.hexdigest()


def cut(items: Sequence[Any], size: int) -> Iterator[Any]:
    return (items[start : start + size] for start in range(0, len(items), size))


def printable(name: str) -> str:
    """A file name as text that can be written as UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_file(path: Path) -> bytes:
    """The bytes of a file that a record names; Rejected where the record is to blame, else the error itself."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Rejected(f"missing file: there is no {printable(str(path))}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise Rejected(f"unreadable file: {printable(str(path))} ({error.strerror})") from None
    except ValueError:  # a zero byte in the name
        raise Rejected("missing file: its name is none that a file can have") from None
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise Rejected(f"missing file: its name is none that a file can have ({error.strerror})") from None


def described(
    place: str, pictures: dict[str, tuple[str, bytes]], sidecars: Mapping[str, bytes], columns: Columns
) -> Record:
    """The record of pictures with a .txt (one caption) or .json beside them, or both."""
    fields: dict[str, Any] = {}
    if ".json" in sidecars:
        fields = parse_object(sidecars[".json"], "sidecar")
    if ".txt" in sidecars:
        name = columns.asked.get("caption") or "caption"
        if fields.get(name) is None:
            fields[name] = as_text(sidecars[".txt"], "sidecar")
    return build_record(place, pictures, fields, columns.of_sidecar(fields), record_id=place)


def as_text(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected(f"unreadable {what}: it is not UTF-8 ({error.reason} at byte {error.start})") from None


def parse_object(content: bytes, what: str) -> dict[str, Any]:
    """A JSON object as a record's fields; Rejected where it is none."""
    try:
        fields = json.loads(as_text(content, what))
    except (ValueError, RecursionError) as error:
        raise Rejected(f"unreadable {what}: it is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise Rejected(f"unreadable {what}: it must be a JSON object")
    return fields


def row_record(place: str, fields: Mapping[str, Any], columns: Columns, folder: Path) -> Record:
    """The record of a table's row: pictures are paths relative to the table's folder, or bytes inside it."""
    pictures = {
        role: _picture_in(fields.get(columns.names[role]), columns.names[role], folder) for role in columns.roles
    }
    role = next((role for role in ("source", "image") if role in pictures), None)
    return build_record(place, pictures, fields, columns, shared=_name_of(pictures[role], folder) if role else "")


def _name_of(picture: tuple[str, bytes], folder: Path) -> str:
    """Of a picture that several records may have: its path, or what is in it where it lies inside the table."""
    name, content = picture
    return name if name and (folder / name).is_file() else hashlib.sha256(content).hexdigest()


def _picture_in(value: Any, column: str, folder: Path) -> tuple[str, bytes]:
    """(file name, bytes) of the picture in a field."""
    name = ""
    if isinstance(value, dict):  # {"bytes", "path"}, as the `datasets` library keeps a picture
        name = value.get("path") or ""
        value = name if value.get("bytes") is None else value["bytes"]
    if value in (None, "", b""):
        raise Rejected(f"no picture: {column} is empty")
    if isinstance(value, bytes):
        return name, value
    if not isinstance(value, str):
        raise Rejected(f"unreadable record: {column} must be a path, not {value!r:.40}")
    if "://" in value[:10]:
        raise Rejected(f"missing file: {value} is not on this machine, download it first")
    return value, read_file(folder / value)
