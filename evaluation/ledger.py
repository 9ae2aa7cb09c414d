"""What has been found out, line by line: a file that is only ever appended to, so that a kill costs the last line."""

import json
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from evaluation.shards import Shard
from zimage_lit.errors import UserError


class Ledger:
    """Entries, a JSON object a line, that are found again by some of their fields; of equal ones the first counts.

    Every shard appends to a file of its own, `<name><shard>.jsonl`, and reads those of all. A last line that a kill
    tore is no entry, and goes when its file is next appended to. The lines are indexed in a temporary database on disk:
    memory does not grow with them.

    folder, name: of the files.   key: the fields that tell entries apart.   shard: whose file is written.
    Raises UserError for a line that is no entry, and where nothing can be written.
    """

    def __init__(self, folder: Path, name: str, key: Sequence[str], shard: Shard) -> None:
        self.key = tuple(key)
        self.path = folder / f"{name}{shard.suffix}.jsonl"
        self._stream: IO[bytes] | None = None
        self._index = sqlite3.connect("", isolation_level=None)  # "": a file of its own, which goes when it is closed
        self._index.execute("PRAGMA journal_mode=OFF")
        self._index.execute("CREATE TABLE entries (key BLOB PRIMARY KEY, line BLOB) WITHOUT ROWID")
        self._index.execute("BEGIN")
        for path in sorted({*folder.glob(f"{name}.jsonl"), *folder.glob(f"{name}.shard*.jsonl")}):
            self._read(path)
        self._index.execute("COMMIT")

    def get(self, entry: Mapping[str, Any]) -> dict[str, Any] | None:
        """The entry with the key fields of this one; None where there is none."""
        row = self._index.execute("SELECT line FROM entries WHERE key = ?", [self._digest(entry)]).fetchone()
        return json.loads(row[0]) if row else None

    def __contains__(self, entry: Mapping[str, Any]) -> bool:
        found = self._index.execute("SELECT 1 FROM entries WHERE key = ?", [self._digest(entry)])
        return found.fetchone() is not None

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Keep entries: what is added is there after a kill. ValueError for numbers that JSON does not have."""
        lines = [
            (self._digest(entry), json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()) for entry in entries
        ]
        try:
            if self._stream is None:
                self._stream = self._opened()
            self._stream.write(b"".join(line + b"\n" for _, line in lines))
            self._stream.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path} ({error.strerror}): make that possible, then start the same command again."
            ) from error
        self._index.executemany("INSERT OR IGNORE INTO entries VALUES (?, ?)", lines)

    def close(self) -> None:
        self._index.close()
        if self._stream is not None:
            self._stream.close()

    def _digest(self, entry: Mapping[str, Any]) -> bytes:
        fields = json.dumps([entry[field] for field in self.key], sort_keys=True, ensure_ascii=False)
        return sha256(fields.encode()).digest()[:16]

    def _read(self, path: Path) -> None:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):
                    break  # torn, or still being written
                try:
                    key = self._digest(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{path}, line {number}, is damaged: delete that line, and what it said is found out again."
                    ) from None
                self._index.execute("INSERT OR IGNORE INTO entries VALUES (?, ?)", [key, line])

    def _opened(self) -> IO[bytes]:
        """The own file at its end, without a torn last line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stream = self.path.open("ab+")
        end = stream.seek(0, os.SEEK_END)
        position = end
        while position > 0:  # back to behind the last line's end
            stream.seek(position - 1)
            if stream.read(1) == b"\n":
                break
            position -= 1
        if position < end:
            stream.truncate(position)
        return stream
