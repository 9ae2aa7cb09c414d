"""What tells a judge's weights apart from others, and the libraries that it runs in: what its record is made of."""

import hashlib
import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from zimage_lit.errors import UserError

DOCUMENTS = (".md", ".png", ".jpg", ".jpeg", ".gif", ".webp", ".lock", ".tmp")  # no judgement depends on them
NAMED_DOCUMENTS = ("license", "notice")


def folder_revision(folder: str | Path) -> str:
    """16 hex digits of the SHA-256 over the sorted names of a folder's files and their contents' SHA-256.

    Weights, configs, vocabularies: all files, those of folders in it too, but for hidden ones and documents (README,
    licence, pictures). The same wherever the folder lies. Each file is read once as long as it does not change: a
    second or two a gigabyte. UserError where there is no folder, no such file, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} with a judge's weights: check the path, or download them there.")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = [name for name in files if _decides(name)]
    if not kept:
        raise UserError(f"{folder} holds no weights: check the path, or download them again.")
    listing = "".join(f"{file_sha256(folder / name)}  {name}\n" for name in kept)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def file_sha256(file: str | Path) -> str:
    """The SHA-256 of a file's contents, 64 hex digits, read once as long as size and time of change stay as they are.

    UserError where it cannot be read.
    """
    try:
        state = os.stat(file)
        return _sha256(str(Path(file).resolve()), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{file}, weights of a judge, cannot be read ({error.strerror}): check the path.") from None


def library_versions(*libraries: str) -> dict[str, str]:
    """Version by name of those libraries, as package indices call them, that are installed, in order."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _decides(name: str) -> bool:
    """Whether what a model says can depend on a file, by its name below the folder."""
    *folders, file = name.lower().split("/")
    hidden = any(part.startswith(".") for part in (*folders, file))
    return not hidden and not file.endswith(DOCUMENTS) and not file.startswith(NAMED_DOCUMENTS)


@lru_cache(maxsize=4096)
def _sha256(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
