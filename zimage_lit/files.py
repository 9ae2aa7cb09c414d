"""Small files: JSON that is read with one clear sentence where it is none, writes that nothing can tear, and locks."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zimage_lit.errors import UserError

AGAIN = "write or download it again"


def read_json(path: Path, way_out: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file; UserError, which ends with the way out, where there is none."""
    if not path.is_file():
        raise UserError(f"{path} is missing: {way_out}.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {way_out}.") from error
    return parse_json(text, str(path), way_out)


def parse_json(text: str, place: str, way_out: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON text; `place` is what errors call it."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON ({error}): {way_out}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{place} must hold a JSON object: {way_out}.")
    return content


@contextmanager
def locked(path: Path, way_out: str, busy: str | None = None) -> Iterator[None]:
    """Hold a lock, which is the kernel's: it goes with the process that holds it, however that ends.

    Waits for whoever holds it; with `busy`, a UserError of these words at once. path: of an empty file, made with its
    folder if missing. Raises UserError, which ends with the way out, where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("w")
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written to ({error.strerror}): {way_out}.") from error
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise UserError(f"{busy}") from None
        yield


def write_atomically(path: Path, content: str | bytes) -> None:
    """A process killed in mid-write leaves the old file, never half of the new one; so does a full disk.

    Raises UserError where nothing can be written there.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path} ({error.strerror}): make that possible, then start the same command again"
        ) from error
