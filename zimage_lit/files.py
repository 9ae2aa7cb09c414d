"""Small files: JSON that is read with one clear sentence where it is none, and writes that nothing can tear."""

import json
import os
from contextlib import suppress
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
