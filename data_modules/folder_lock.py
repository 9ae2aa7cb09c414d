"""Who may prepare a data folder: one process at a time, and only into a folder that is free or was prepared alike."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_modules.manifest import MANIFEST, read_manifest
from zimage_lit.errors import UserError

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
            f"{data_dir} holds {manifest.name} prepared with {', '.join(different)}: "
            f"set {folder_key} to another folder, or delete this one to prepare it anew."
        )
    return True


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed, as `key=before (now key=now)`."""
    return [f"{key}={before.get(key)} (now {key}={value})" for key, value in now.items() if before.get(key) != value]


@contextmanager
def sole_preparation(data_dir: Path, folder_key: str) -> Iterator[None]:
    """Hold the folder's lock, after waiting for whoever holds it; the folder is made if missing.

    The lock is the kernel's: it goes with the process that holds it, however that ends. A preparation that fails or is
    killed leaves its mark, by which the next one knows the folder for its own. Raises UserError for a folder with
    files that no preparation began.
    """
    marker = data_dir / LOCK
    try:
        if data_dir.exists() and not marker.exists() and any(data_dir.iterdir()) and not (data_dir / MANIFEST).exists():
            raise UserError(f"{data_dir} is not empty and holds no data set: set {folder_key} to a folder of its own.")
        data_dir.mkdir(parents=True, exist_ok=True)
        stream = marker.open("w")
    except OSError as error:
        raise UserError(
            f"{data_dir} cannot be written to ({error.strerror}): set {folder_key} to another folder."
        ) from error
    with stream:
        fcntl.lockf(stream, fcntl.LOCK_EX)
        yield
    marker.unlink(missing_ok=True)
