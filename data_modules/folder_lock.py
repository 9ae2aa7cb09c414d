"""Who may prepare a data folder: one process at a time, and only into a folder that is free or was prepared alike."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_modules.manifest import MANIFEST, read_manifest
from zimage_lit.errors import UserError
from zimage_lit.files import locked, read_json, write_atomically

PARTS = ".parts"  # below the data folder, until it is finished
GO_ON = "everything finished is kept, and the same command goes on from there"
LOCK = ".preparing"  # lies in the folder from the first moment of a preparation to its end


def is_prepared(data_dir: Path, settings: Mapping[str, Any], folder_key: str) -> bool:
    """Whether the folder holds a finished data set of these settings.

    folder_key: the setting that names the folder, for the message. Raises UserError where the settings were others.
    """
    if not (data_dir / MANIFEST).exists():
        return False
    manifest = read_manifest(data_dir)
    different = differences(manifest.settings, settings)
    if different:
        raise UserError(
            f"{data_dir} holds {manifest.name} prepared with {', '.join(different)}: set {folder_key} to another "
            "folder, delete this one to prepare it anew, or give the same settings to use it."
        )
    return True


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed, as `key=before (now key=now)`."""
    changed = {key: value for key, value in now.items() if before.get(key) != value}
    if list(changed) == ["source_listing"]:
        return ["other files in its source, whose names or sizes have changed since"]
    return [f"{key}={before.get(key)} (now {key}={value})" for key, value in changed.items()]


def begin_or_go_on(parts_dir: Path, settings: Mapping[str, Any], folder_key: str) -> None:
    """Note in `parts_dir`, a folder below the data folder, with which settings its parts are made.

    Raises UserError where parts lie there that were made with others.
    """
    note, data_dir = parts_dir / "settings.json", parts_dir.parent
    settings = json.loads(json.dumps(settings))
    if note.is_file():
        different = differences(read_json(note, f"delete {data_dir} and prepare it again"), settings)
        if different:
            raise UserError(
                f"{data_dir} holds an unfinished preparation with {', '.join(different)}: give the same settings to "
                f"continue it, set {folder_key} to another folder, or delete this one to begin anew."
            )
    write_atomically(note, json.dumps(settings, ensure_ascii=False))


def clean_up(data_dir: Path, parts_dir: Path) -> None:
    """Remove what a preparation leaves that was killed behind its last step, before it could."""
    shutil.rmtree(parts_dir, ignore_errors=True)
    (data_dir / LOCK).unlink(missing_ok=True)


@contextmanager
def sole_preparation(data_dir: Path, folder_key: str) -> Iterator[None]:
    """Hold the folder's lock, after waiting for whoever holds it; the folder is made if missing.

    A preparation that fails or is killed leaves its mark, by which the next one knows the folder for its own. Raises
    UserError for a folder with files that no preparation began, or that cannot be written to.
    """
    marker, way_out = data_dir / LOCK, f"set {folder_key} to another folder"
    try:
        foreign = (
            data_dir.is_dir() and any(data_dir.iterdir()) and not (marker.exists() or (data_dir / MANIFEST).exists())
        )
    except OSError as error:  # a folder that may not be looked into
        raise UserError(f"{data_dir} cannot be written to ({error.strerror}): {way_out}.") from error
    if foreign:
        raise UserError(f"{data_dir} is not empty and holds no data set: set {folder_key} to a folder of its own.")
    with locked(marker, way_out):
        yield
    marker.unlink(missing_ok=True)
